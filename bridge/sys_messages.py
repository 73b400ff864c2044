"""System messages of OTP behaviours: what ``sys:get_state/1`` and its siblings ask of a process.

Source: OTP ``sys.erl``, ``handle_system_msg`` and ``do_cmd``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bridge.exit_signals import is_atom
from bridge.process import Process
from bridge.process_errors import Exit
from bridge.term import Atom, ImproperList, Pid, Ref, Term

OK: Final = Atom("ok")
ERROR: Final = Atom("error")
_RUNNING: Final = Atom("running")
_SUSPENDED: Final = Atom("suspended")


class Terminate(Exit):
    """The process was told to end, by its parent or by ``sys:terminate/2``."""


def chars(text: str) -> list[int]:
    """``text`` as an Erlang string: a list of code points."""
    return [ord(char) for char in text]


def reply(me: Process, from_: Term, term: Term) -> None:
    """Answer a ``gen`` call, its tag given back bit for bit.

    Source: OTP ``gen.erl``, ``reply/2``: the alias, where the tag has one.
    """
    to, tag = from_
    head = tag.items[0] if isinstance(tag, ImproperList) else None
    if is_atom(head, "alias") and isinstance(tag.tail, Ref):
        to = tag.tail
    elif isinstance(tag, list) and tag:
        head = tag[0]
    if (
        isinstance(head, ImproperList)
        and is_atom(head.items[0], "alias")
        and isinstance(head.tail, Ref)
    ):
        to = head.tail
    me.send(to, (tag, term))


def is_from(from_: Term) -> bool:
    """Whether ``from_`` is ``{Pid, Tag}``: somebody that an answer can be sent to."""
    return type(from_) is tuple and len(from_) == 2 and type(from_[0]) is Pid


def is_system(message: Term) -> bool:
    """Whether ``message`` is ``{system, From, Request}``."""
    return (
        type(message) is tuple
        and len(message) == 3
        and is_atom(message[0], "system")
        and is_from(message[1])
    )


def is_parent_exit(me: Process, message: Term) -> bool:
    """Whether ``message`` tells that the parent ended: then so must a behaviour."""
    return (
        type(message) is tuple
        and len(message) == 3
        and is_atom(message[0], "EXIT")
        and me.parent is not None
        and bool(message[1] == me.parent)
    )


async def handle(me: Process, message: Term, state: Callable[[], Term], module: str) -> None:
    """Answer one system message. A suspended process stays in here until it is resumed.

    Args:
        message: as ``is_system`` knows it.
        state: gives the state to show, as an encodable term.
        module: name shown as the callback module.

    Raises:
        Terminate: the process has to end with the reason in it.
    """
    _answer(me, message, state, module, suspended=False)
    if not is_atom(message[2], "suspend"):
        return

    def wanted(message: Term) -> Term | None:
        return message if is_system(message) or is_parent_exit(me, message) else None

    while True:
        message = await me.receive(wanted)
        if is_parent_exit(me, message):
            raise Terminate(message[2])
        _answer(me, message, state, module, suspended=not is_atom(message[2], "resume"))
        if is_atom(message[2], "resume"):
            return


def _answer(
    me: Process, message: Term, state: Callable[[], Term], module: str, *, suspended: bool
) -> None:
    _, from_, request = message
    match request:
        case Atom("suspend") | Atom("resume"):
            answer: Term = OK
        case Atom("get_state"):
            answer = (OK, state())
        case Atom("get_status"):
            answer = _status(me, state(), module, _SUSPENDED if suspended else _RUNNING)
        case (Atom("terminate"), reason):
            reply(me, from_, OK)
            raise Terminate(reason)
        case (Atom("debug"), Atom("no_debug")):
            answer = OK
        case (Atom("replace_state" | "debug") as name, _) | (Atom("change_code") as name, _, _, _):
            answer = (ERROR, (Atom("not_supported"), name))
        case _:
            answer = (ERROR, (Atom("unknown_system_msg"), request))
    reply(me, from_, answer)


def _status(me: Process, state: Term, module: str, mode: Atom) -> Term:
    parent = me.parent or me.pid
    dictionary = {
        Atom("$ancestors"): me.ancestors,
        Atom("$initial_call"): (
            Atom(me.initial_call[0]),
            Atom(me.initial_call[1]),
            me.initial_call[2],
        ),
        **({Atom("$process_label"): me.label.encode()} if me.label else {}),
        **me.dictionary,
    }
    who = str(me.name or me.pid)
    misc = [
        (Atom("header"), chars(f"Status for generic server {who}")),
        (
            Atom("data"),
            [(chars("Status"), mode), (chars("Parent"), parent), (chars("Logged events"), [])],
        ),
        (Atom("data"), [(chars("State"), state)]),
    ]
    return (
        Atom("status"),
        me.pid,
        (Atom("module"), Atom(module)),
        [list(dictionary.items()), mode, parent, [], misc],
    )
