"""What election servers tell each other, as plain terms that travel by distribution.

Seconds in messages are read by nobody but the node that wrote them: they come back to it in
``Ack``, so clocks need not agree.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from bridge.term import Atom, Term
from control.quorum import Roster, roster_of, roster_term

Stamp = tuple[int, int]


class Status(NamedTuple):
    """How one node stands in the round ``clock``.

    Attributes:
        seniority: size of the largest round this node has won; -1 without the coordinator role.
        epoch: newest epoch that this node has agreed to.
        lineage: the cluster it belongs to; rounds are between nodes of one.
        free: bound to no leader, so it could agree to a new one now.
        able: sees a quorum, so it could lead.
        ask: whoever hears it shall answer with its own.
    """

    clock: int
    seniority: int
    commands: int
    epoch: int
    lineage: str
    free: bool
    able: bool
    ask: bool


class Claim(NamedTuple):
    """I won the round ``clock``: agree that ``epoch`` is mine. ``stamp`` is my roster's."""

    epoch: int
    clock: int
    seniority: int
    commands: int
    lineage: str
    stamp: Stamp


class Grant(NamedTuple):
    """Agreed; with the voter's roster where that is newer than the claim's."""

    epoch: int
    roster: Roster | None


class Refuse(NamedTuple):
    """Not agreed: the voter's ``status`` says why (newer epoch, bound to a leader, better)."""

    epoch: int
    status: Status


class Lead(NamedTuple):
    """I lead ``epoch``, with authority if ``sure``. Binds whoever accepts it for ``hold_s``."""

    epoch: int
    sent_s: float
    clock: int
    seniority: int
    commands: int
    lineage: str
    stamp: Stamp
    sure: bool


class Ack(NamedTuple):
    """I follow you since your ``sent_s``; the roster on my disk has this ``stamp``."""

    epoch: int
    sent_s: float
    lineage: str
    stamp: Stamp


class Nack(NamedTuple):
    """I do not follow you in ``of``: I follow nobody below ``epoch``."""

    epoch: int
    of: int


class Tell(NamedTuple):
    """The leader's roster, for a follower whose own is another."""

    epoch: int
    sent_s: float
    roster: Roster


class Resign(NamedTuple):
    """I lead no longer: nobody is bound to me for ``epoch`` or an older one."""

    epoch: int


Message = Status | Claim | Grant | Refuse | Lead | Ack | Nack | Tell | Resign

_TYPES: Final[dict[str, type[Any]]] = {
    cls.__name__.lower(): cls
    for cls in (Status, Claim, Grant, Refuse, Lead, Ack, Nack, Tell, Resign)
}
_KINDS: Final = {cls: Atom(name) for name, cls in _TYPES.items()}
_NO_ROSTER: Final = Atom("undefined")


class BadMessage(ValueError):
    """A term that is no message of an election."""


def message_term(message: Message) -> Term:
    """``message`` as a term; ``message_of`` reads it."""
    return (_KINDS[type(message)], *map(_field_term, message))


def _field_term(value: Any) -> Term:
    if isinstance(value, Roster):
        return roster_term(value)
    if isinstance(value, Status):
        return message_term(value)
    if value is None:
        return _NO_ROSTER
    return Atom(value) if isinstance(value, str) else value


def message_of(term: Term) -> Message:
    """Read ``message_term``'s answer. Raises BadMessage."""
    if not isinstance(term, tuple) or not term or term[0] not in _TYPES:
        raise BadMessage(f"not a message of an election: {term!r}")
    cls = _TYPES[term[0]]
    names: tuple[str, ...] = cls._fields
    if len(term) != len(names) + 1:
        raise BadMessage(f"{term[0]} has {len(names)} fields, not {len(term) - 1}")
    try:
        message: Message = cls(*map(_field, names, term[1:]))
    except ValueError as exc:
        raise BadMessage(f"{term[0]}: {exc}") from exc
    if isinstance(message, Tell) and message.roster is None:
        raise BadMessage("tell: no roster")
    return message


def _field(name: str, term: Any) -> Any:
    match name, term:
        case (("free" | "able" | "ask" | "sure"), bool()):
            return term
        case (("clock" | "seniority" | "commands" | "epoch" | "of"), int()) if type(term) is int:
            return term
        case "sent_s", float() | int():
            return float(term)
        case "lineage", str():
            return str(term)
        case "stamp", (int(epoch), int(number)):
            return (epoch, number)
        case "status", _:
            status = message_of(term)
            if isinstance(status, Status):
                return status
        case "roster", "undefined":
            return None
        case "roster", _:
            return roster_of(term)
    raise ValueError(f"{name} cannot be {term!r}")
