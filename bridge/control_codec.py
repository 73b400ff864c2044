"""Control tuples of a distribution link to typed messages and back.

A seq_trace token of a stock peer is read and dropped. The old unlink (operation 4) is not
spoken: UNLINK_ID is mandatory.

Source: erl_dist_protocol, "Protocol between Connected Nodes"; erts ``dist.h`` for the marks of
operation 37.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bridge.control_messages import (
    Demonitor,
    ExitSignal,
    GroupLeader,
    Link,
    LinkExit,
    Message,
    Monitor,
    MonitorDown,
    Send,
    SendAlias,
    SendName,
    SpawnReply,
    SpawnRequest,
    Unlink,
    UnlinkAck,
)
from bridge.errors import ProtocolError
from bridge.flags import Flag
from bridge.term import Atom, Pid, Port, Ref, Term

_NO_COOKIE: Final = Atom("")
_PRIORITY, _TOKEN, _ALIAS, _NAME, _EXIT = (1 << bit for bit in range(5))  # operation 37

# What may stand in for a process: stock nodes also link and monitor ports.
_PROCESS: Final = (Pid, Port)


class NoPayload:
    """The type of NO_PAYLOAD: this control message has no term after it."""


NO_PAYLOAD: Final = NoPayload()

# Plain ints: `&` with an IntFlag costs as much as all the rest.
_EXIT_PAYLOAD: Final = int(Flag.EXIT_PAYLOAD)
_ALTACT_SIG: Final = int(Flag.ALTACT_SIG)
_SEND_SENDER: Final = int(Flag.SEND_SENDER)


def to_control(message: Message, flags: int) -> tuple[tuple[Term, ...], Term]:
    """The control tuple and the term after it (or NO_PAYLOAD), as the link's flags want it."""
    match message:
        case Send() | SendName() | SendAlias():
            return _send(message, flags)
        case Link(sender, to):
            return (1, sender, to), NO_PAYLOAD
        case Unlink(number, sender, to):
            return (35, number, sender, to), NO_PAYLOAD
        case UnlinkAck(number, sender, to):
            return (36, number, sender, to), NO_PAYLOAD
        case LinkExit(sender, to, reason):
            if flags & _EXIT_PAYLOAD:
                return (24, sender, to), reason
            return (3, sender, to, reason), NO_PAYLOAD
        case ExitSignal(sender, to, reason, priority):
            if flags & _ALTACT_SIG and (priority or not isinstance(to, Pid)):
                return (37, _EXIT | _marks(to, priority=priority), sender, to), reason
            if flags & _EXIT_PAYLOAD:
                return (26, sender, to), reason
            return (8, sender, to, reason), NO_PAYLOAD
        case Monitor(sender, target, ref):
            return (19, sender, target, ref), NO_PAYLOAD
        case Demonitor(sender, target, ref):
            return (20, sender, target, ref), NO_PAYLOAD
        case MonitorDown(source, to, ref, reason):
            if flags & _EXIT_PAYLOAD:
                return (28, source, to, ref), reason
            return (21, source, to, ref, reason), NO_PAYLOAD
        case SpawnRequest(ref, sender, leader, module, function, arguments, options):
            mfa = (module, function, len(arguments))
            return (29, ref, sender, leader, mfa, options), arguments
        case SpawnReply(ref, to, linked, monitored, result):
            return (31, ref, to, int(linked) | int(monitored) << 1, result), NO_PAYLOAD
        case GroupLeader(sender, to):
            return (7, sender, to), NO_PAYLOAD


def _marks(to: Pid | Ref | Atom, *, priority: bool) -> int:
    kind = _ALIAS if isinstance(to, Ref) else _NAME if isinstance(to, Atom) else 0
    return kind | (_PRIORITY if priority else 0)


def _send(message: Send | SendName | SendAlias, flags: int) -> tuple[tuple[Term, ...], Term]:
    sender, to, payload = message.sender, message.to, message.message
    alias = isinstance(to, Ref)
    if (alias or message.priority) and flags & _ALTACT_SIG and sender is not None:
        return (37, _marks(to, priority=message.priority), sender, to), payload
    if alias:
        return (33, sender, to), payload
    if isinstance(to, Atom):
        return (6, sender, _NO_COOKIE, to), payload
    if flags & _SEND_SENDER and sender is not None:
        return (22, sender, to), payload
    return (2, _NO_COOKIE, to), payload


# Operation -> (number of elements, whether a term follows). Those with a trace token (``_TT`` in
# OTP) are their plain form with the token where `_UNTRACED` says.
_SHAPES: Final[dict[int, tuple[int, bool]]] = {
    1: (3, False),
    2: (3, True),
    3: (4, False),
    6: (4, True),
    7: (3, False),
    8: (4, False),
    19: (4, False),
    20: (4, False),
    21: (5, False),
    22: (3, True),
    24: (3, True),
    26: (3, True),
    28: (4, True),
    29: (6, True),
    31: (5, False),
    33: (3, True),
    35: (4, False),
    36: (4, False),
}
# Traced operation -> (plain operation, index of the token).
_UNTRACED: Final[dict[int, tuple[int, int]]] = {
    12: (2, 3),
    13: (3, 3),
    16: (6, 4),
    18: (8, 3),
    23: (22, 3),
    25: (24, 3),
    27: (26, 3),
    30: (29, 6),
    32: (31, 5),
    34: (33, 3),
}


def check_control(control: Term) -> tuple[tuple[Term, ...], bool]:
    """A control tuple without its trace token, and whether a term must follow it.

    Raises:
        ProtocolError: unknown operation or wrong number of elements.
    """
    if type(control) is not tuple or not control or type(control[0]) is not int:
        raise ProtocolError("control message is no tuple with an operation")
    op, size = control[0], len(control)
    if op == 37:
        if size not in (4, 5) or type(control[1]) is not int:
            raise ProtocolError(f"control message 37 of {size} elements")
        return control[:4], True
    if op in _UNTRACED:
        op, token = _UNTRACED[op]
        control = (op, *control[1:token], *control[token + 1 :])
        size = len(control) if size > token else 0
    shape = _SHAPES.get(op)
    if shape is None or size != shape[0]:
        raise ProtocolError(f"control message {op} of {size} elements")
    return control, shape[1]


def from_control(control: tuple[Term, ...], payload: Term) -> Message:
    """The message of a tuple that passed `check_control`. Raises ProtocolError."""
    try:
        return _READERS[control[0]](control, payload)
    except _WrongType:
        kinds = ", ".join(type(element).__name__ for element in control[1:])
        raise ProtocolError(f"control message {control[0]} with {kinds}") from None


class _WrongType(Exception):
    pass


def _pid(value: Term) -> Pid:
    if type(value) is not Pid:
        raise _WrongType
    return value


def _process(value: Term) -> Pid:
    # A Port stands where a Pid does: only compared, never looked into.
    if type(value) not in _PROCESS:
        raise _WrongType
    return value  # type: ignore[no-any-return]


def _ref(value: Term) -> Ref:
    if type(value) is not Ref:
        raise _WrongType
    return value


def _atom(value: Term) -> Atom:
    if type(value) is bool:
        return Atom(str(value).lower())
    if type(value) is not Atom:
        raise _WrongType
    return value


def _target(value: Term) -> Pid | Atom:
    return _process(value) if type(value) in _PROCESS else _atom(value)


def _number(value: Term) -> int:
    if type(value) is not int or value < 0:
        raise _WrongType
    return value


def _altact(control: tuple[Term, ...], payload: Term) -> Message:
    _, marks, sender, to = control
    priority = bool(marks & _PRIORITY)
    target: Pid | Ref | Atom
    if marks & _ALIAS:
        target = _ref(to)
    elif marks & _NAME:
        target = _atom(to)
    else:
        target = _pid(to)
    if marks & _EXIT:
        return ExitSignal(_process(sender), target, payload, priority)
    if isinstance(target, Ref):
        return SendAlias(_process(sender), target, payload, priority)
    if isinstance(target, Atom):
        return SendName(_process(sender), target, payload, priority)
    return Send(_process(sender), target, payload, priority)


def _spawn_request(control: tuple[Term, ...], payload: Term) -> SpawnRequest:
    _, ref, sender, leader, mfa, options = control
    if type(mfa) is not tuple or len(mfa) != 3 or type(payload) is not list:
        raise _WrongType
    module, function, arity = mfa
    if _number(arity) != len(payload):
        raise _WrongType
    return SpawnRequest(
        _ref(ref), _pid(sender), _process(leader), _atom(module), _atom(function), payload, options
    )


def _spawn_reply(control: tuple[Term, ...], _payload: Term) -> SpawnReply:
    _, ref, to, marks, result = control
    found = _number(marks)
    return SpawnReply(_ref(ref), _pid(to), bool(found & 1), bool(found & 2), _target(result))


_READERS: Final[dict[int, Callable[[tuple[Term, ...], Term], Message]]] = {
    1: lambda c, _: Link(_process(c[1]), _process(c[2])),
    2: lambda c, p: Send(None, _pid(c[2]), p),
    3: lambda c, _: LinkExit(_process(c[1]), _process(c[2]), c[3]),
    6: lambda c, p: SendName(_process(c[1]), _atom(c[3]), p),
    7: lambda c, _: GroupLeader(_process(c[1]), _pid(c[2])),
    8: lambda c, _: ExitSignal(_process(c[1]), _process(c[2]), c[3]),
    19: lambda c, _: Monitor(_process(c[1]), _target(c[2]), _ref(c[3])),
    20: lambda c, _: Demonitor(_process(c[1]), _target(c[2]), _ref(c[3])),
    21: lambda c, _: MonitorDown(_target(c[1]), _process(c[2]), _ref(c[3]), c[4]),
    22: lambda c, p: Send(_process(c[1]), _pid(c[2]), p),
    24: lambda c, p: LinkExit(_process(c[1]), _process(c[2]), p),
    26: lambda c, p: ExitSignal(_process(c[1]), _process(c[2]), p),
    28: lambda c, p: MonitorDown(_target(c[1]), _process(c[2]), _ref(c[3]), p),
    29: _spawn_request,
    31: _spawn_reply,
    33: lambda c, p: SendAlias(_process(c[1]), _ref(c[2]), p),
    35: lambda c, _: Unlink(_number(c[1]), _process(c[2]), _process(c[3])),
    36: lambda c, _: UnlinkAck(_number(c[1]), _process(c[2]), _process(c[3])),
    37: _altact,
}
