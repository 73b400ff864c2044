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
and layout gets it, unless it asks for a ``fresh`` one.

Of two holders that want the same rank of the same instance the newer placement wins: its lease
kills all children of older ones. One that is not newer is refused as ``held``.
"""

from __future__ import annotations

import logging
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control.port_child import Child, Seat
from control.port_keeper import PortKeeper, StartPort
from control.rank_lease import dial

log = logging.getLogger("control.ports")

HELLO_S = 60.0  # from start of the OS process to its hello; importing may be slow on a cold disk
ADOPT_S = 3.0  # how long a lease waits for the child of a former life
MAX_ATTEMPTS = 3  # ports that a lease may wait for, one after the other

__all__ = ["Ports", "StartPort"]


class Ports(PortKeeper):
    """Broker of OS children."""

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
            case ("DOWN", Ref() as monitor, _, _, reason):
                for child in list(self.state.children.values()):
                    if child.monitor == monitor:
                        self._holder_down(child, reason)
            case _:
                await super().handle_info(message)

    # -- leases ----------------------------------------------------------------------------

    def _lease(
        self, seat: Seat, holder: Pid, from_: Term, *, fresh: bool = False, attempt: int = 1
    ) -> Term:
        for child in self._same_instance(seat):
            newer = seat.placement > child.seat.placement
            if child.holder is None:
                gives_way = child.seat.layout != seat.layout or (
                    fresh and child.seat.key == seat.key
                )
            elif child.holder != holder and child.seat.key == seat.key and not newer:
                text = (
                    f"rank {seat.rank} of {seat.instance} is held by {child.holder} "
                    f"of placement {child.seat.placement}, asked for by one of {seat.placement}"
                )
                return (Atom("error"), Atom("held"), text)
            else:
                gives_way = newer
            if gives_way:
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

    def _same_instance(self, seat: Seat) -> list[Child]:
        children = self.state.children.values()
        return [c for c in children if c.seat.instance == seat.instance and not c.killed]

    def _claim(self, port_id: str, holder: Pid, from_: Term) -> Term:
        child = self.state.children.get(port_id)
        if child is None or child.killed:
            return (Atom("error"), Atom("unknown_port"), f"port {port_id} has ended")
        if child.holder not in (None, holder):
            return (Atom("error"), Atom("held"), f"port {port_id} is held by {child.holder}")
        return self._hold(child, holder, from_, child.attempt)

    def _choose(self, seat: Seat, holder: Pid) -> Child | None:
        """The child that already holds this rank's weights, else a spare, readiest first."""
        for child in self._same_instance(seat):
            if child.seat.rank == seat.rank and child.holder in (None, holder):
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
        else:
            self._warm_spares()
        return Atom("welcome")

    def _exited(self, child: Child, text: str) -> None:
        super()._exited(child, text)
        if child.monitor is not None:
            self.me.demonitor(child.monitor)
        if child.waiter is not None:
            self._lease_again(child, text)
        elif child.holder is not None:
            self.me.send(child.holder, (Atom("port_exit"), child.port_id, text))

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
