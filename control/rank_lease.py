"""How a rank comes to hold a port, of this machine or another, and keeps it.

What runs here is a process beside the rank's own, which stays free to be looked at and ended. It
asks ``ports`` of the port's machine for a lease; while that machine is out of reach, or its control
process is being started again, it asks again. Once it holds a port of another machine it goes on
watching: when the control process there dies, the port lives on, and is claimed of the next one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from bridge import gen_server
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of

RETRY_S = 0.2
CLAIM_S = 10.0
DIAL_S = 5.0  # longer than a port tries to reach a machine
# Refusals that time may mend.
_AGAIN = frozenset({"held", "unreachable"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """Which port is wanted.

    Attributes:
        node: whose port; empty is this machine.
        layout: only weights that are cut so are of use; see `instance_spec.layout_of`.
        placement: epochs of earlier placements; of two holders the one with more is newer.
        fresh: no port that has served before, whatever it holds.
        spans: the instance has ranks on several machines.
    """

    instance: str
    rank: int
    node: str = ""
    layout: str = ""
    placement: int = 0
    fresh: bool = False
    spans: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A port that is held."""

    port_id: str
    port: Pid
    os_pid: int


class NoPort(Exception):
    """There is none to be had, or the one that was held is gone."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def ports_of(me: Process, node: str) -> Atom | tuple[Atom, Atom]:
    """The process ``ports`` of ``node``, empty for this one."""
    return Atom("ports") if node in ("", me.node.name) else (Atom("ports"), Atom(node))


async def hold(me: Process, want: Want, holder: Pid, timeout_s: float) -> None:
    """Body of the process: lease a port for ``holder``, tell it, and keep a remote one.

    Sends ``{leased, PortId, Port, OsPid}`` to ``holder``, and ``{no_port, Text}`` when there is
    none within ``timeout_s``, or no longer.
    """
    options: dict[Any, Term] = {
        Atom("holder"): holder,
        Atom("layout"): want.layout,
        Atom("placement"): want.placement,
        Atom("fresh"): want.fresh,
        Atom("spans"): want.spans,
    }
    request: Term = (Atom("lease"), want.instance, want.rank, options)
    dest = ports_of(me, want.node)
    loop = asyncio.get_running_loop()
    try:
        # Watched before it is asked: no restart of `ports` in between can be missed.
        monitor, held = await _ask(me, dest, request, loop.time() + timeout_s)
        me.send(holder, (Atom("leased"), held.port_id, held.port, held.os_pid))
        while isinstance(dest, tuple):
            await me.receive(_is_down(monitor))
            claim = (Atom("claim"), held.port_id, holder)
            monitor, again = await _ask(me, dest, claim, None)
            if again != held:
                raise NoPort(f"port {held.port_id} has become another process")
    except NoPort as exc:
        me.send(holder, (Atom("no_port"), exc.text))


async def _ask(
    me: Process, dest: Atom | tuple[Atom, Atom], request: Term, deadline_s: float | None
) -> tuple[Ref, Lease]:
    """Ask until there is an answer; a monitor on ``ports`` that is older than the answer.

    Without a deadline it asks until the port itself is lost, which the holder finds out.

    Raises:
        NoPort: it was refused, or the time is over.
    """
    loop = asyncio.get_running_loop()
    while True:
        left_s = CLAIM_S if deadline_s is None else max(RETRY_S, deadline_s - loop.time())
        monitor = me.monitor(dest)
        try:
            answer = await gen_server.call(me, dest, request, timeout_s=left_s)
        except gen_server.CallError as exc:
            answer = (Atom("error"), Atom("unreachable"), str(exc))
        match answer:
            case ("ok", port_id, Pid() as port, int(os_pid)):
                return monitor, Lease(text_of(port_id), port, os_pid)
            case ("error", kind, text):
                again, why = str(kind) in _AGAIN, text_of(text)
            case other:
                again, why = False, show(other)
        me.demonitor(monitor)
        if not again or (deadline_s is not None and loop.time() >= deadline_s):
            raise NoPort(why)
        await asyncio.sleep(RETRY_S)


async def dial(me: Process, port: Pid, node: str) -> Term:
    """Have ``port`` connect to ``node``: ``ok``, or ``{error, unreachable, Text}``."""
    try:
        return await gen_server.call(me, port, (Atom("dial"), Atom(node)), timeout_s=DIAL_S)
    except gen_server.CallError as exc:
        return (Atom("error"), Atom("unreachable"), f"a port does not dial {node}: {exc}")


def _is_down(monitor: Ref) -> Any:
    return lambda m: True if isinstance(m, tuple) and m[:2] == ("DOWN", monitor) else None
