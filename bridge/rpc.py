"""What peers may run here: ``rpc``, ``erpc`` and ``spawn_request`` against a table of functions.

Whatever is not in the table runs nothing, and fails at the caller as a missing function does.

Source: OTP ``erpc.erl``, ``execute_call/4``; the wire forms were measured.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from bridge.control_messages import SpawnReply, SpawnRequest
from bridge.exit_signals import is_atom
from bridge.peer import Peer
from bridge.process import Body, Process
from bridge.process_errors import CallTimeout, Exit, NodeDown, ReceiveTimeout
from bridge.runner import crash_reason
from bridge.term import Atom, Term

_log: Final = logging.getLogger("bridge.rpc")

# Takes the process it runs in and the arguments; Exit, Throw, ErlangError are Erlang's classes.
Function: TypeAlias = Callable[..., Awaitable[Term]]
# (module, function, number of arguments)
Functions: TypeAlias = dict[tuple[str, str, int], Function]

_UNDEF: Final = Atom("undef")


class Throw(Exception):
    """Raise in a function: the caller gets ``throw(Value)``."""

    def __init__(self, value: Term) -> None:
        super().__init__(value)
        self.value: Term = value


class ErlangError(Exception):
    """Raise in a function: the caller gets ``error(Reason)``, such as ``badarg``."""

    def __init__(self, reason: Term) -> None:
        super().__init__(reason)
        self.reason: Term = reason


class _Undefined(Exception):
    pass


async def call(
    me: Process,
    node: str,
    module: str,
    function: str,
    arguments: list[Term],
    *,
    timeout_s: float = 5.0,
) -> Term:
    """``erpc:call/5``: the value of a function of another node.

    Raises:
        ErlangError, Throw, Exit: as the function did.
        NodeDown: the node is unreachable, was lost, or spawns nothing for others.
        CallTimeout: no answer within ``timeout_s``.
    """
    result = me.make_ref()
    where = (Atom(module), Atom(function), arguments)
    ref = me.node.spawn_monitored(me, node, "erpc", "execute_call", [result, *where])

    def match(message: Term) -> Term | None:
        match message:
            case ("DOWN", found, _, _, reason) if found == ref:
                return (reason,)
        return None

    try:
        (reason,) = await me.receive(match, timeout_s=timeout_s)
    except BaseException as exc:
        me.demonitor(ref)
        if isinstance(exc, ReceiveTimeout):
            raise CallTimeout(Atom("timeout"), Atom(node), where, timeout_s) from exc
        raise
    match reason:
        case (found, "return", value) if found == result:
            return value
        case (found, "throw", value) if found == result:
            raise Throw(value)
        case (found, "exit", value) if found == result:
            raise Exit(value)
        case (found, "error", value, _) if found == result:
            raise ErlangError(value)
        case _:
            raise NodeDown((Atom("nodedown"), Atom(node)), Atom(node), where, timeout_s)


class Rpc:
    """Serves spawn requests. ``functions`` may change at any time."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def spawn(self, peer: Peer, request: SpawnRequest) -> None:
        """Start the process that a peer asks for, and tell it so."""
        linked = monitored = False
        for option in request.options if isinstance(request.options, list) else ():
            name = option[0] if isinstance(option, tuple) and option else option
            linked = linked or is_atom(name, "link")
            monitored = monitored or is_atom(name, "monitor")
        node = peer.node
        process = node.spawn_process(
            self._body(request), label=f"{request.module}:{request.function}"
        )
        process.initial_call = (request.module, request.function, len(request.arguments))
        process.group_leader = request.group_leader
        if linked:
            peer.linked(process, request.sender)
        if monitored:
            peer.watched(process, request.sender, request.id, process.pid)
        peer.send(SpawnReply(request.id, request.sender, linked, monitored, process.pid))

    def _body(self, request: SpawnRequest) -> Body:
        match request.module, request.function, request.arguments:
            case "erpc", "execute_call", [result, module, function, list() as arguments]:

                async def call(me: Process) -> None:
                    outcome = await self._outcome(me, module, function, arguments)
                    raise Exit((result, *outcome), quiet=True)

                return call
            case "erpc", "execute_cast", [module, function, list() as arguments]:
                pass
            case module, function, arguments:
                pass

        async def cast(me: Process) -> None:
            try:
                await self._invoke(me, module, function, arguments)
            except _Undefined:
                where: Term = (module, function, arguments, [])
                raise Exit((_UNDEF, [where]), quiet=True) from None

        return cast

    async def _invoke(
        self, me: Process, module: Term, function: Term, arguments: list[Term]
    ) -> Term:
        named = type(module) is Atom and type(function) is Atom
        found = self._functions.get((module, function, len(arguments))) if named else None
        if found is None:
            _log.info("%s: call of %s:%s/%d is refused", me, module, function, len(arguments))
            raise _Undefined
        return await found(me, *arguments)

    async def _outcome(
        self, me: Process, module: Term, function: Term, arguments: list[Term]
    ) -> tuple[Term, ...]:
        """The exit reason behind the caller's result reference."""
        try:
            return Atom("return"), await self._invoke(me, module, function, arguments)
        except _Undefined:
            return Atom("error"), _UNDEF, [(module, function, arguments, [])]
        except Throw as thrown:
            return Atom("throw"), thrown.value
        except Exit as exc:
            return Atom("exit"), exc.reason
        except ErlangError as exc:
            return Atom("error"), exc.reason, [(module, function, arguments, [])]
        except Exception as exc:  # noqa: BLE001 -- it is the caller's to handle
            _log.error("%s:%s/%d failed", module, function, len(arguments), exc_info=exc)
            kind, text, _ = crash_reason(exc)
            # Python's stack stays here: it is in the log.
            return Atom("error"), (kind, text), [(module, function, len(arguments), [])]
