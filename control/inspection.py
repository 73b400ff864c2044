"""Looking into a process of a node, near or far, and ending it: what the shells do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bridge import gen_server
from bridge.process import Dest, Process
from bridge.process_errors import ReceiveTimeout
from bridge.show import show
from bridge.term import Atom, Pid, Term
from control.errors import ControlError

ANSWER_S: Final = 5.0


class NoSuchProcess(ControlError):
    """Nobody has this name, or the process is gone."""

    kind = "not_found"

    def __init__(self, who: str | Pid, node: str, known: Iterable[str] = ()) -> None:
        super().__init__(who, node, known)
        self.who, self.node, self.known = who, node, tuple(sorted(known))

    def __str__(self) -> str:
        if isinstance(self.who, Pid):
            return f"no process {self.who!r} lives on {self.node}; tree() shows those that do"
        names = ", ".join(self.known)
        there = f"there are: {names}" if names else "tree() shows those there are"
        return f"no process is registered as {self.who!r} on {self.node}; {there}"


class NoAnswer(ControlError):
    """The process is there but does not show what it was asked for."""

    kind = "no_answer"

    def __init__(self, who: str | Pid, why: str) -> None:
        super().__init__(who, why)
        self.who, self.why = who, why

    def __str__(self) -> str:
        return f"{self.who} {self.why}"


async def state_of(me: Process, node: str, who: str | Pid) -> Term:
    """The state of a server or supervisor, as ``sys:get_state/1``.

    Args:
        who: a registered name, or a pid.

    Raises:
        NoSuchProcess, NoAnswer: nobody is there; it is busy, or no server.
        CallError: the link to ``node`` was lost, or the process ended meanwhile.
    """
    match await _ask(me, node, who, Atom("get_state")):
        case ("ok", state):
            return state
        case other:
            raise NoAnswer(who, f"does not show its state: {show(other)}")


async def kill(me: Process, node: str, who: str | Pid) -> Pid:
    """End a process with ``exit(Pid, kill)``, which it cannot trap; its pid, once it is gone.

    Raises:
        NoSuchProcess, NoAnswer: nobody is there, or it cannot be found.
        CallError: as ``state_of``.
    """
    pid = who if isinstance(who, Pid) else await _whereis(me, node, who)
    ref = me.monitor(pid)
    me.exit(pid, Atom("kill"))
    try:
        reason = await me.receive(
            lambda m: (m[4],) if isinstance(m, tuple) and m[:2] == ("DOWN", ref) else None,
            timeout_s=ANSWER_S,
        )
    except ReceiveTimeout as exc:
        me.demonitor(ref)
        raise NoAnswer(who, f"was told to end, but did not within {ANSWER_S:g} s") from exc
    if reason == (Atom("noproc"),):
        raise NoSuchProcess(who, node)
    return pid


async def _whereis(me: Process, node: str, name: str) -> Pid:
    if node == me.node.name:
        pid = me.node.whereis(name)
        if pid is None:
            raise NoSuchProcess(name, node, me.node.registered())
        return pid
    match await _ask(me, node, name, Atom("get_status")):
        case ("status", Pid() as pid, *_):
            return pid
        case other:
            raise NoAnswer(name, f"does not tell its pid: {show(other)}")


async def _ask(me: Process, node: str, who: str | Pid, request: Term) -> Term:
    dest: Dest = who if isinstance(who, Pid) else (Atom(who), Atom(node))
    try:
        return await gen_server.sys_call(me, dest, request, timeout_s=ANSWER_S)
    except gen_server.NoProc as exc:
        known = me.node.registered() if node == me.node.name else ()
        raise NoSuchProcess(who, node, known) from exc
    except gen_server.CallTimeout as exc:
        raise NoAnswer(
            who, f"gave no answer within {ANSWER_S:g} s: it is busy, suspended, or no server"
        ) from exc
