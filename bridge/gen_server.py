"""Servers as OTP's ``gen_server`` has them: one process, one state, call and cast.

The messages are OTP's own, so a caller or server may as well be an Erlang process anywhere.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from bridge import runner, sys_messages
from bridge.exit_signals import KILL, NOCONNECTION, NOPROC, is_atom
from bridge.process import Dest, Process
from bridge.process_errors import (
    CallError,
    CallExit,
    CallTimeout,
    Exit,
    NameRegistered,
    NodeDown,
    NoProc,
    ReceiveTimeout,
    StartError,
)
from bridge.show import show
from bridge.sys_messages import is_from, reply
from bridge.term import Atom, ImproperList, Pid, Ref, Term

if TYPE_CHECKING:
    from bridge.local_node import LocalNode

__all__ = [
    "NOREPLY",
    "CallError",
    "CallExit",
    "CallTimeout",
    "GenServer",
    "NoProc",
    "NodeDown",
    "StartError",
    "Stop",
    "call",
    "cast",
    "node_call",
    "node_cast",
    "reply",
    "start",
    "start_link",
    "sys_call",
]

_log: Final = logging.getLogger("bridge.gen_server")

_CALL: Final = Atom("$gen_call")
_CAST: Final = Atom("$gen_cast")
_SYSTEM: Final = Atom("system")
_ALIAS: Final = (Atom("alias"),)


class _NoReply:
    def __repr__(self) -> str:
        return "NOREPLY"


NOREPLY: Final = _NoReply()


class _Terminated(Exit):
    """``terminate`` has run already."""


class Stop(Exception):
    """Raise in a callback: end the server with ``reason``, after ``reply`` if one is given."""

    def __init__(self, reason: Term, reply: Term = NOREPLY) -> None:
        super().__init__(reason)
        self.reason: Term = reason
        self.reply: Term = reply


class GenServer:
    """Subclass with the callbacks that are needed. ``self.me`` is the server's process.

    Set ``continue_with`` in any callback to have ``handle_continue`` run before the next message.
    """

    me: Process
    continue_with: Term = NOREPLY

    async def init(self, me: Process) -> None:
        """Prepare. The starter waits for it. ``Stop`` or an error makes the start fail."""

    async def handle_call(self, request: Term, from_: Term) -> Term:
        """Answer a call: the reply, or NOREPLY and a ``reply(me, from_, term)`` later."""
        text = f"{type(self).__name__} has no call {show(request)}"
        return (Atom("error"), Atom("unknown_call"), text.encode("utf-8", "replace"))

    async def handle_cast(self, message: Term) -> None:
        """Act on a cast."""
        _log.info("%s: unknown cast %s", self.me, show(message))

    async def handle_info(self, message: Term) -> None:
        """Act on any other message."""
        _log.info("%s: unexpected message %s", self.me, show(message))

    async def handle_continue(self, what: Term) -> None:
        """Go on with what ``continue_with`` was set to."""

    async def terminate(self, reason: Term) -> None:
        """Clean up. Not run when an exit signal ends a server that does not trap exits."""

    def format_state(self) -> Term:
        """The state that ``sys:get_state/1`` and crash reports show: an encodable term."""
        return {
            Atom(name): repr(value)[:2000].encode("utf-8", "replace")
            for name, value in vars(self).items()
            if not name.startswith("_") and name not in ("me", "continue_with")
        }

    def format_message(self, message: Term) -> Term:
        """The last message as a crash report shows it: the place to leave secrets out."""
        return message


async def start_link(
    parent: Process,
    server: GenServer,
    *,
    name: str | None = None,
    timeout_s: float | None = None,
    label: str = "",
) -> Pid:
    """Start ``server`` linked to ``parent``; returns once its ``init`` is done.

    Raises:
        StartError: the name is taken, ``init`` failed or took longer than ``timeout_s`` (None
            waits). As in OTP, a parent that does not trap exits ends with the reason too.
    """
    return await _start(parent.node, server, parent, name, timeout_s, label)


async def start(
    node: LocalNode,
    server: GenServer,
    *,
    name: str | None = None,
    timeout_s: float | None = None,
    label: str = "",
) -> Pid:
    """Start ``server`` on its own. Raises StartError, as ``start_link``."""
    return await _start(node, server, None, name, timeout_s, label)


async def _start(
    node: LocalNode,
    server: GenServer,
    parent: Process | None,
    name: str | None,
    timeout_s: float | None,
    label: str,
) -> Pid:
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def body(me: Process) -> None:
        await _serve(me, server, started)

    try:
        child = node.spawn_process(
            body, parent=parent, link=parent is not None, name=name, label=label
        )
    except NameRegistered as exc:
        raise StartError((Atom("already_started"), exc.owner)) from exc
    child.label = label or type(server).__name__
    child.initial_call = (type(server).__module__, "init", 1)

    def ended(task: asyncio.Task[None]) -> None:
        if not started.done():
            started.set_exception(StartError(child.exit_reason))

    assert child.task is not None
    child.task.add_done_callback(ended)
    try:
        async with asyncio.timeout(timeout_s):
            await started
    except TimeoutError as exc:
        if parent is not None:
            parent.unlink(child.pid)
        node.exit(child.pid, child.pid, KILL)
        raise StartError(Atom("timeout")) from exc
    except StartError:
        if parent is not None:  # the starter has the reason: no second message with it
            parent.mailbox.remove(
                lambda m: type(m) is tuple and is_atom(m[0], "EXIT") and m[1] == child.pid
            )
        raise
    return child.pid


async def _serve(me: Process, server: GenServer, started: asyncio.Future[None]) -> None:
    server.me = me
    last: Term = Atom("none")
    me.describe_state = lambda: (
        f"{show(server.format_state(), 2000)}; "
        f"last message {show(server.format_message(last), 500)}"
    )
    try:
        await server.init(me)
    except Stop as stop:
        raise Exit(stop.reason) from stop
    if not started.done():
        started.set_result(None)
    module = f"{type(server).__module__}.{type(server).__qualname__}"
    try:
        while True:
            while server.continue_with is not NOREPLY:
                what, server.continue_with = server.continue_with, NOREPLY
                await server.handle_continue(what)
            last = message = await me.receive()
            if type(message) is tuple and len(message) in (2, 3) and type(message[0]) is Atom:
                kind = message[0]
                if kind == "$gen_call" and len(message) == 3 and not is_from(message[1]):
                    _log.warning("%s: a call from nobody: %s", server.me, show(message))
                    continue
                if kind == "$gen_call" and len(message) == 3:
                    await _handle_call(server, message[1], message[2])
                    continue
                if kind == "$gen_cast" and len(message) == 2:
                    await server.handle_cast(message[1])
                    continue
                if sys_messages.is_system(message):
                    await sys_messages.handle(me, message, server.format_state, module)
                    continue
                if sys_messages.is_parent_exit(me, message):
                    raise sys_messages.Terminate(message[2])
            await server.handle_info(message)
    except Stop as stop:
        await server.terminate(stop.reason)
        raise Exit(stop.reason) from stop
    except _Terminated:
        raise
    except Exception as exc:
        reason = runner.crash_reason(exc)
        await server.terminate(reason)
        # Here, not in the runner: both must name the same reason, and the stack has grown there.
        runner.report(me, reason, exc)
        raise Exit(reason, quiet=True) from exc


async def _handle_call(server: GenServer, from_: Term, request: Term) -> None:
    try:
        answer = await server.handle_call(request, from_)
    except Stop as stop:
        if stop.reply is NOREPLY:
            raise
        # OTP's order: clean up, then answer, then end.
        try:
            await server.terminate(stop.reason)
        finally:
            reply(server.me, from_, stop.reply)
        raise _Terminated(stop.reason) from stop
    if answer is not NOREPLY:
        reply(server.me, from_, answer)


async def call(
    me: Process,
    dest: Dest,
    request: Term,
    *,
    timeout_s: float | None = 5.0,
    kind: Atom = _CALL,
) -> Term:
    """Ask a server, near or far, and wait for its reply.

    Args:
        kind: the first element of the message that asks.

    Raises:
        CallTimeout: no reply within ``timeout_s`` (None waits for ever); a late one vanishes.
        NoProc: no such process.
        NodeDown: its node is unreachable or was lost.
        CallExit: it ended with some other reason first.
    """
    if dest == me.pid or (me.name is not None and dest == me.name):
        raise CallError(Atom("calling_self"), dest, request, timeout_s)
    skip = me.mailbox_length  # what is here already cannot be the answer
    assert not isinstance(dest, Ref), "calls go to pids and names: an alias cannot be monitored"
    ref = me.monitor(dest, alias="reply_demonitor")
    me.send(dest, (kind, (me.pid, ImproperList(_ALIAS, ref)), request))

    def match(message: Term) -> tuple[bool, Any] | None:
        if type(message) is not tuple:
            return None
        size = len(message)
        if size == 2:
            tag = message[0]
            if type(tag) is ImproperList and tag.tail == ref:
                return True, message[1]
        elif size == 5 and message[1] == ref and is_atom(message[0], "DOWN"):
            return False, message[4]
        return None

    try:
        answered, value = await me.receive(match, timeout_s=timeout_s, skip=skip)
    except ReceiveTimeout as exc:
        me.demonitor(ref)
        raise CallTimeout(Atom("timeout"), dest, request, timeout_s) from exc
    except BaseException:
        me.demonitor(ref)
        raise
    if answered:
        return value
    if is_atom(value, NOPROC):
        raise NoProc(value, dest, request, timeout_s)
    if is_atom(value, NOCONNECTION):
        where = dest.node if isinstance(dest, Pid) else dest[1]
        raise NodeDown((Atom("nodedown"), Atom(where)), dest, request, timeout_s)
    raise CallExit(value, dest, request, timeout_s)


async def sys_call(me: Process, dest: Dest, request: Term, *, timeout_s: float = 5.0) -> Term:
    """What the functions of OTP's ``sys`` ask, such as ``get_state``. Raises as ``call``."""
    return await call(me, dest, request, timeout_s=timeout_s, kind=_SYSTEM)


async def node_call(
    node: LocalNode, dest: Dest, request: Term, *, timeout_s: float | None = 5.0
) -> Term:
    """``call`` for code that is no process. Raises as ``call``."""
    with node.open_process(label="call") as me:
        return await call(me, dest, request, timeout_s=timeout_s)


def cast(me: Process, dest: Dest, message: Term) -> None:
    """Tell a server something; nothing comes back, not even an error."""
    me.send(dest, (_CAST, message))


def node_cast(node: LocalNode, dest: Dest, message: Term) -> None:
    """``cast`` for code that is no process."""
    with node.open_process(label="cast") as me:
        cast(me, dest, message)
