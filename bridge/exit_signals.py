"""What an exit signal does to the process it reaches: pure rules, the same for near and far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bridge.term import Atom, Pid, Term

NORMAL: Final = Atom("normal")
KILL: Final = Atom("kill")
KILLED: Final = Atom("killed")
NOPROC: Final = Atom("noproc")
NOCONNECTION: Final = Atom("noconnection")
SHUTDOWN: Final = Atom("shutdown")

_EXIT: Final = Atom("EXIT")
_DOWN: Final = Atom("DOWN")
_PROCESS: Final = Atom("process")
_NODEDOWN: Final = Atom("nodedown")


@dataclass(frozen=True, slots=True)
class Die:
    """The process ends with ``reason``."""

    reason: Term


@dataclass(frozen=True, slots=True)
class Deliver:
    """The signal becomes ``message`` in the mailbox."""

    message: Term


def is_atom(term: Term, name: str) -> bool:
    """Whether ``term`` is the atom ``name``, not a binary or text that reads the same."""
    return isinstance(term, Atom) and term == name


def link_exit(sender: Pid, reason: Term, *, trapping: bool) -> Die | Deliver | None:
    """Effect of the end of a linked process. None: nothing happens.

    Source: Erlang reference manual, "Processes", receiving exit signals.
    """
    if trapping:
        return Deliver((_EXIT, sender, reason))
    return None if is_atom(reason, NORMAL) else Die(reason)


def exit_request(sender: Pid, to: Pid, reason: Term, *, trapping: bool) -> Die | Deliver | None:
    """Effect of ``exit(to, reason)`` sent by ``sender``. ``kill`` cannot be trapped.

    Source: documentation of ``erlang:exit/2``.
    """
    if is_atom(reason, KILL):
        return Die(KILLED)
    if trapping:
        return Deliver((_EXIT, sender, reason))
    if is_atom(reason, NORMAL) and sender != to:
        return None
    return Die(reason)


def down_message(ref: Term, target: Term, reason: Term) -> Term:
    """The message of a monitor that fires; ``target`` is a pid or ``{Name, Node}``."""
    return (_DOWN, ref, _PROCESS, target, reason)


def nodedown_message(node: str) -> Term:
    """The message of ``monitor_node/2`` when the link to ``node`` is lost."""
    return (_NODEDOWN, Atom(node))


def is_clean(reason: Term) -> bool:
    """Whether OTP writes no crash report for this reason."""
    if isinstance(reason, tuple):
        return len(reason) == 2 and is_atom(reason[0], SHUTDOWN)
    return is_atom(reason, NORMAL) or is_atom(reason, SHUTDOWN)
