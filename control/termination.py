"""How a supervisor ends children: the exit signal, the wait, the kill, and what really happened."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.term import Atom, Pid, Ref, Term
from control.spec import Shutdown

SHUTDOWN: Final = Atom("shutdown")
KILL: Final = Atom("kill")
UNLINKED: Final = Atom("child_process_unlinked")


async def end_children(
    me: Process, pids: Iterable[Pid], shutdown: Shutdown
) -> list[tuple[Pid, Term]]:
    """End ``pids`` at the same time; return each with its exit reason when all are gone.

    All are told at once; those that live ``shutdown`` seconds later are killed. Other messages
    stay in the mailbox of ``me``, the supervisor.

    Source: OTP 28 ``supervisor.erl``, ``shutdown/1`` and ``wait_dynamic_children/5``.
    """
    waiting = {me.monitor(pid): pid for pid in pids}
    for pid in waiting.values():
        me.exit(pid, KILL if shutdown == "brutal_kill" else SHUTDOWN)
    loop = asyncio.get_running_loop()
    kill_at_s = None if isinstance(shutdown, str) else loop.time() + shutdown
    ended: list[tuple[Pid, Term]] = []

    def is_down(message: Term) -> tuple[Ref, Term] | None:
        match message:
            case (Atom("DOWN"), Ref() as ref, _, _, reason) if ref in waiting:
                return ref, reason
        return None

    while waiting:
        left_s = None if kill_at_s is None else max(0.0, kill_at_s - loop.time())
        try:
            ref, reason = await me.receive(is_down, timeout_s=left_s)
        except ReceiveTimeout:
            kill_at_s = None
            for pid in waiting.values():
                me.exit(pid, KILL)
            continue
        pid = waiting.pop(ref)
        ended.append((pid, await _unlink(me, pid, reason)))
    return ended


async def end_child(me: Process, pid: Pid, shutdown: Shutdown) -> Term:
    """End one child; return its exit reason."""
    [(_, reason)] = await end_children(me, [pid], shutdown)
    return reason


async def _unlink(me: Process, pid: Pid, reason: Term) -> Term:
    """Take the exit signal of a dead child out of the mailbox.

    One that was dead before (``noproc``) left its reason there, unless it had unlinked itself.
    """
    me.unlink(pid)

    def is_exit(message: Term) -> tuple[Term] | None:
        match message:
            case (Atom("EXIT"), Pid() as sender, why) if sender == pid:
                return (why,)
        return None

    try:
        (left,) = await me.receive(is_exit, timeout_s=0)
    except ReceiveTimeout:
        left = UNLINKED
    return left if reason == "noproc" else reason
