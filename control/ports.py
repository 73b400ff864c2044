"""The registered process ``ports``: owns every OS child of this node, leases it to a rank.

Keeps spare children that have imported their engine already, so that a rank is replaced
in the time it takes to map the weights. Writes down which children it has, so that the
next life of the control process adopts those that still run and kills the rest.

====================================================  ======================================
call ``{lease, Instance, Rank}`` or
``{lease, Instance, Rank, #{holder, layout,``
``placement, fresh, spans}}``                         ``{ok, PortId, PortPid, OsPid}`` | error
call ``{claim, PortId, Holder}``                      the same, of this very port
call ``{release, PortId}``                            ``ok``: killed, waited for 5 s at most
call ``{hello, PortPid, Facts}`` (from a port)        ``welcome`` | ``unknown``
call ``ports``                                        list of maps
sends ``{port_exit, PortId, Text}``                   to the leaseholder
====================================================  ======================================

A holder (whoever asks, or the pid given) may be on another machine. Its port is made to dial that
machine before the lease is answered: it does not listen itself. A child ends with its holder,
except where the holder is out of reach (``noconnection``): it may live, or a restarted control
process may want the weights. Such an orphan is kept for ``orphan_s``, and a lease of the same rank
and layout gets it, unless it asks for a ``fresh`` one. Once a lease ``spans`` machines, spares
import what ranks need to meet over a network, which takes seconds, and memory.

Of two holders that want the same rank of the same instance the newer placement wins: its lease
kills the other's child. One that is not newer is refused as ``held``.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control.os_process import OsChild
from control.port_child import Child, Seat, read_records, write_records
from control.rank_lease import dial

log = logging.getLogger("control.ports")

HELLO_S = 60.0  # from start of the OS process to its hello; importing may be slow on a cold disk
ADOPT_S = 3.0  # how long a lease waits for the child of a former life
ORPHAN_S = 10.0
KILL_S = 5.0
MAX_ATTEMPTS = 3  # ports that a lease may wait for, one after the other
TRIM_S = 30.0


class StartPort(Protocol):
    """Starts the OS process of a port; passed in, so that tests can start another program."""

    def __call__(self, port_id: str) -> OsChild:
        """Raises OSError."""
        ...


@dataclass(slots=True)
class PortsState:
    """What ``sys:get_state`` shows."""

    children: dict[str, Child] = field(default_factory=dict)
    started: int = 0
    spans: bool = False  # ranks here have met those of other machines


class Ports(GenServer):
    """Broker of OS children.

    Args:
        start_port: starts one child.
        record_path: JSON file that survives this process.
        num_spares: idle children kept ready for each rank of the largest instance: when one
            rank is lost, all of them start anew.
        name_prefix: makes port ids unique on the machine across lives.
        trim_s: from the end of a rank until spares that nobody needs any more are ended.
        orphan_s: for which a child is kept whose holder is out of reach.
    """

    def __init__(
        self,
        start_port: StartPort,
        *,
        record_path: Path,
        num_spares: int,
        name_prefix: str,
        trim_s: float = TRIM_S,
        orphan_s: float = ORPHAN_S,
    ) -> None:
        super().__init__()
        self._start_port = start_port
        self._record_path = record_path
        self._num_spares = num_spares
        self._prefix = name_prefix
        self._trim_s, self._orphan_s = trim_s, orphan_s
        self.state = PortsState()

    def format_state(self) -> Term:
        return [_describe(c) for c in self.state.children.values()]

    async def init(self, me: Process) -> None:
        self.me.trap_exit = True  # so that terminate runs and no child is left over
        self._adopt_records()
        self._fill_spares()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("lease", instance, int(rank)):
                return self._lease(Seat(instance=text_of(instance), rank=rank), from_[0], from_)
            case (
                "lease",
                instance,
                int(rank),
                {"holder": Pid() as holder, "layout": layout, "placement": int(placement), **more},
            ):
                seat = Seat(
                    instance=text_of(instance),
                    rank=rank,
                    layout=text_of(layout),
                    placement=placement,
                )
                self.state.spans |= more.get("spans") is True
                return self._lease(seat, holder, from_, fresh=more.get("fresh") is True)
            case ("claim", port_id, Pid() as holder):
                return self._claim(text_of(port_id), holder, from_)
            case ("release", port_id):
                self._release(text_of(port_id), from_)
                return NOREPLY
            case ("hello", Pid() as pid, dict(facts)):
                return self._hello(pid, facts)
            case "ports":
                return self.format_state()
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("os_exit", str(port_id), str(text)):
                self._on_exit(port_id, text)
            case ("expire", str(port_id), int(version)):
                self._expire(port_id, version)
            case ("fill_spares",):
                self._fill_spares()
                self._warm_spares()
            case ("trim_spares",):
                self._trim_spares()
            case ("DOWN", Ref() as monitor, _, _, reason):
                for child in list(self.state.children.values()):
                    if child.monitor == monitor:
                        self._holder_down(child, reason)
            case ("EXIT", _, _):
                pass  # a watcher ended
            case _:
                await super().handle_info(message)

    async def terminate(self, reason: Term) -> None:
        children = list(self.state.children.values())
        for child in children:
            child.identity.kill_group()
        await asyncio.gather(*(self._gone(child) for child in children))
        self.state.children.clear()
        self._write_records()

    # -- leases ----------------------------------------------------------------------------

    def _lease(
        self, seat: Seat, holder: Pid, from_: Term, *, fresh: bool = False, attempt: int = 1
    ) -> Term:
        for child in list(self.state.children.values()):
            if child.seat.key != seat.key or child.killed or child.holder == holder:
                continue
            if child.holder is not None and seat.placement <= child.seat.placement:
                text = (
                    f"rank {seat.rank} of {seat.instance} is held by {child.holder} "
                    f"of placement {child.seat.placement}, asked for by one of {seat.placement}"
                )
                return (Atom("error"), Atom("held"), text)
            if child.holder is not None or fresh or child.seat.layout != seat.layout:
                log.info("port %s gives way to a newer rank of %s", child.port_id, seat.instance)
                self._kill(child)
        found = self._choose(seat, holder)
        if found is None:
            try:
                found = self._start()
            except OSError as exc:
                return (Atom("error"), Atom("port_start"), f"cannot start a compute port: {exc}")
        found.seat = seat
        self._write_records()
        self._later(1.0, (Atom("fill_spares"),))
        return self._hold(found, holder, from_, attempt)

    def _claim(self, port_id: str, holder: Pid, from_: Term) -> Term:
        child = self.state.children.get(port_id)
        if child is None or child.killed:
            return (Atom("error"), Atom("unknown_port"), f"port {port_id} has ended")
        if child.holder not in (None, holder):
            return (Atom("error"), Atom("held"), f"port {port_id} is held by {child.holder}")
        return self._hold(child, holder, from_, child.attempt)

    def _choose(self, seat: Seat, holder: Pid) -> Child | None:
        """The child that already holds this rank's weights, else a spare, readiest first."""
        for child in self.state.children.values():
            mine = child.seat.key == seat.key and not child.killed
            if mine and child.holder in (None, holder):
                return child
        return min(self._spares(), key=lambda c: c.pid is None, default=None)

    def _hold(self, child: Child, holder: Pid, from_: Term, attempt: int) -> Term:
        """Make ``holder`` the holder; the answer, or NOREPLY where it comes later."""
        if child.holder != holder:
            self._let_go(child)
            child.holder, child.monitor = holder, self.me.monitor(holder)
        if child.pid is None:
            child.waiter, child.attempt = from_, attempt
            self._expire_later(child, ADOPT_S if child.os_child is None else HELLO_S)
        else:
            self._hand_over(child, from_)
        return NOREPLY

    def _hand_over(self, child: Child, from_: Term) -> None:
        """Answer a lease, once the port has a link to the machine of its holder."""
        port, holder = child.pid, child.holder
        assert port is not None
        assert holder is not None
        leased = (Atom("ok"), child.port_id, port, child.identity.pid)
        if holder.node == self.me.node.name:
            gen_server.reply(self.me, from_, leased)
            return

        async def connect(me: Process) -> None:
            answer = await dial(me, port, str(holder.node))
            gen_server.reply(me, from_, leased if answer == "ok" else answer)

        self.me.spawn(connect, link=True, label=f"port {child.port_id} dials {holder.node}")

    def _holder_down(self, child: Child, reason: Term) -> None:
        if reason != "noconnection":
            self._kill(child)
            return
        log.warning("port %s: its holder on another machine is out of reach", child.port_id)
        self._let_go(child)
        self._expire_later(child, self._orphan_s)

    def _let_go(self, child: Child) -> None:
        if child.monitor is not None:
            self.me.demonitor(child.monitor)
        child.holder = child.monitor = child.waiter = None
        child.version += 1

    def _release(self, port_id: str, from_: Term) -> None:
        child = self.state.children.get(port_id)
        if child is None:
            gen_server.reply(self.me, from_, Atom("ok"))
            return
        self._kill(child)

        async def wait(me: Process) -> None:
            await self._gone(child)
            gen_server.reply(me, from_, Atom("ok"))

        self.me.spawn(wait, link=True, label=f"release {port_id}")

    def _hello(self, pid: Pid, facts: dict[Any, Term]) -> Term:
        child = self.state.children.get(text_of(facts.get("port_id", b"")))
        if child is None:
            log.warning("hello from a port that is not ours: %s", pid)
            return Atom("unknown")
        child.pid = pid
        if child.waiter is not None:
            waiter, child.waiter = child.waiter, None
            self._hand_over(child, waiter)
        elif self.state.spans:
            gen_server.cast(self.me, pid, Atom("warm_network"))
        return Atom("welcome")

    # -- OS children -----------------------------------------------------------------------

    def _start(self) -> Child:
        self.state.started += 1
        port_id = f"{self._prefix}_{self.state.started}"
        os_child = self._start_port(port_id)
        child = Child(port_id, os_child.identity, os_child)
        self.state.children[port_id] = child
        self._watch(child)
        self._write_records()
        return child

    def _watch(self, child: Child) -> None:
        async def watch(me: Process) -> None:
            if child.os_child is not None:
                text = _status_text(await child.os_child.wait())
            else:
                await child.identity.wait_gone(timeout_s=None)
                text = "exited"
            me.send(self.me.pid, (Atom("os_exit"), child.port_id, text))

        self.me.spawn(watch, link=True, label=f"watch {child.port_id}")

    def _fill_spares(self) -> None:
        for _ in range(self._wanted_spares() - len(self._spares())):
            try:
                self._start()
            except OSError as exc:
                log.error("cannot start a spare port: %s", exc)
                return

    def _warm_spares(self) -> None:
        """Those that were there before the first lease that spans machines."""
        for child in self._spares() if self.state.spans else []:
            if child.pid is not None:
                gen_server.cast(self.me, child.pid, Atom("warm_network"))

    def _trim_spares(self) -> None:
        """End spares beyond what the instances of now need, the last started first."""
        for child in self._spares()[self._wanted_spares() :]:
            self._kill(child)

    def _spares(self) -> list[Child]:
        return [c for c in self.state.children.values() if not c.seat.instance and c.free]

    def _wanted_spares(self) -> int:
        ranks = Counter(c.seat.instance for c in self.state.children.values() if c.seat.instance)
        return self._num_spares * max(ranks.values(), default=1)

    def _on_exit(self, port_id: str, text: str) -> None:
        child = self.state.children.pop(port_id, None)
        if child is None:
            return
        if child.os_child is not None:
            child.os_child.reap()
        if child.monitor is not None:
            self.me.demonitor(child.monitor)
        if child.waiter is not None:
            self._lease_again(child, text)
        elif child.holder is not None:
            self.me.send(child.holder, (Atom("port_exit"), port_id, text))
        self._write_records()
        if child.seat.instance:
            self._later(self._trim_s, (Atom("trim_spares"),))
        else:
            self._later(1.0, (Atom("fill_spares"),))  # a spare that keeps dying must not spin

    def _lease_again(self, child: Child, text: str) -> None:
        """A port ended before it was handed over: that is no fault of the rank, take another."""
        answer: Term = (
            Atom("error"),
            Atom("port_exit"),
            f"{child.attempt} compute ports ended before they answered, the last, {child.port_id}, "
            f"{text}; see logs/port-{child.port_id}.log",
        )
        if child.attempt < MAX_ATTEMPTS and child.holder is not None:
            log.warning("port %s %s before it answered; taking another", child.port_id, text)
            answer = self._lease(child.seat, child.holder, child.waiter, attempt=child.attempt + 1)
        if answer is not NOREPLY:
            gen_server.reply(self.me, child.waiter, answer)

    def _expire_later(self, child: Child, after_s: float) -> None:
        self._later(after_s, (Atom("expire"), child.port_id, child.version))

    def _expire(self, port_id: str, version: int) -> None:
        child = self.state.children.get(port_id)
        if child is None or child.version != version:
            return
        if child.pid is not None and child.holder is not None:
            return
        log.warning("port %s did not come back in time or nobody wants it; killed", port_id)
        self._kill(child)

    async def _gone(self, child: Child) -> None:
        """Wait for the end of a child that was killed."""
        gone = await child.identity.wait_gone(timeout_s=KILL_S)
        if child.os_child is not None:
            gone = await child.os_child.reaped(timeout_s=KILL_S)
        if not gone:
            log.error("port %s was killed but is still there", child.port_id)

    def _kill(self, child: Child) -> None:
        child.killed = True
        child.identity.kill_group()

    # -- former lives ----------------------------------------------------------------------

    def _adopt_records(self) -> None:
        for child in read_records(self._record_path):
            if not child.identity.alive():
                continue
            if not child.seat.instance:  # a spare of a former life: cheaper to start a new one
                child.identity.kill_group()
                continue
            self.state.children[child.port_id] = child
            self._watch(child)
            self._expire_later(child, self._orphan_s)

    def _write_records(self) -> None:
        write_records(self._record_path, self.state.children.values())

    def _later(self, delay_s: float, message: Term) -> None:
        self.me.send_after(delay_s, self.me.pid, message)


def _describe(child: Child) -> Term:
    return {
        Atom("port_id"): child.port_id,
        Atom("os_pid"): child.identity.pid,
        Atom("instance"): child.seat.instance,
        Atom("rank"): child.seat.rank,
        Atom("holder"): child.holder or Atom("undefined"),
        Atom("connected"): child.pid is not None,
        Atom("adopted"): child.os_child is None,
    }


def _status_text(status: int) -> str:
    if status >= 0 or sys.platform == "win32":
        return f"exited with status {status}"
    return f"was killed by signal {-status}"
