"""One simulated machine: the real rules, wired as the servers wire them, over the network.

It has a disk that outlives a crash, a clock of its own speed, and can be stopped for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from control import desired_sync as sync
from control import election_rule as election
from control import membership_rule as membership
from control.election_messages import Resign
from control.election_state import (
    Changed,
    CommandsSeen,
    DocumentsSafe,
    Heard,
    Leave,
    NodeDown,
    NodeUp,
    Promise,
    Save,
    Send,
    Tick,
    authority,
    initial,
)
from control.election_state import Limits as ElectionLimits
from control.quorum import Roster
from tests.sim.network import World
from tests.sim.placer import Placer

TICK_S = 0.25
MEMBERSHIP = membership.Limits(check_s=TICK_S)


@dataclass
class Disk:
    """What a crash leaves."""

    roster: Roster
    promise: Promise = field(default_factory=Promise)
    desired: sync.Disk = field(default_factory=sync.Disk)


class Machine:
    """A node of the cluster.

    Args:
        watch: told ``(machine, what, data)`` of everything that an invariant may be about.
    """

    def __init__(
        self,
        world: World,
        name: str,
        disk: Disk,
        *,
        candidate: bool,
        offset_s: float,
        speed: float,
        watch: Callable[[Machine, str, Any], None],
        limits: ElectionLimits | None = None,
    ) -> None:
        self.world, self.name, self.disk, self.candidate = world, name, disk, candidate
        self.offset_s, self.speed, self.watch, self.limits = offset_s, speed, watch, limits
        self.cluster: dict[str, Machine] = {}
        self.alive = False
        self.died_s = self.born_s = 0.0
        self.stopped_until_s = self.sluggish_s = self.busy_until_s = 0.0
        self.incarnation = 0
        self.running: set[str] = set()  # instances: they end with the machine, not the process

    def clock_s(self) -> float:
        """This machine's own time."""
        return self.offset_s + self.world.now_s * self.speed

    def true_s(self, clock_s: float) -> float:
        """True time at which this machine's clock says ``clock_s``."""
        return (clock_s - self.offset_s) / self.speed

    # -- life and death --------------------------------------------------------------------

    def start(self) -> None:
        self.alive = True
        self.incarnation += 1
        self.born_s = self.world.now_s
        self.sessions: dict[str, int] = {}
        self.peers: dict[str, membership.Peer] = {}
        self.ticks = 0
        now_s = self.clock_s()
        self.checked_s = now_s
        self.sync = sync.State(self.name, self.disk.desired)
        self.placer = Placer(self)
        self.election = initial(
            self.name,
            candidate=self.candidate,
            roster=self.disk.roster,
            promise=self.disk.promise,
            now_s=now_s,
            limits=self.limits,
        )
        self._elected(*election.begin(self.election, now_s))
        self._later(TICK_S * self.world.rng.random(), self.tick)

    def crash(self, *, machine: bool) -> None:
        """End at once. A lost machine says nothing and loses its instances."""
        self.alive = False
        self.died_s = self.world.now_s
        if machine:
            self.running.clear()
            self.world.lose_power(self.name)
        else:
            for peer in list(self.sessions):
                self._hang_up(peer)
        self.watch(self, "crash", None)

    def leave(self) -> None:
        """End in good order."""
        self._event(Leave())
        self.crash(machine=False)

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        self.world.at(self.world.now_s + delay_s, self._if_alive, self.incarnation, act)

    def _if_alive(self, incarnation: int, act: Callable[[], None]) -> None:
        if not self.alive or incarnation != self.incarnation:
            return
        if self.world.now_s < self.stopped_until_s:
            self.world.at(self.stopped_until_s, self._if_alive, incarnation, act)
            return
        act()

    # -- connections -----------------------------------------------------------------------

    def dial(self, other: str) -> None:
        """Connect, if bytes pass both ways; a connection replaces an older one at both ends."""
        peer, world = self.cluster[other], self.world
        if not (peer.alive and world.linked(self.name, other) and world.linked(other, self.name)):
            return
        if world.now_s < peer.stopped_until_s:
            return
        session = self.world.next_session()
        peer._connected(self.name, session)
        self._connected(other, session)

    def _connected(self, other: str, session: int) -> None:
        if other in self.sessions:
            self._disconnected(other, self.sessions[other])
        self.sessions[other] = session
        self.peers[other] = membership.connected(self.clock_s())
        self.say((other,), "beat", membership.Beat(self.incarnation, 1, b"facts"))

    def _disconnected(self, other: str, session: int) -> None:
        if session and self.sessions.get(other) == session:
            del self.sessions[other]
            self._peer_actions(other, membership.disconnected(self.peers.pop(other)))

    def _hang_up(self, other: str) -> None:
        session = self.sessions.pop(other)
        self.peers.pop(other)
        peer = self.cluster[other]

        def closed() -> None:
            peer._if_alive(peer.incarnation, lambda: peer._disconnected(self.name, session))

        self.world.carry(self.name, other, "close", closed)

    def reset(self, other: str) -> None:
        """The connection breaks, at this end first."""
        if self.alive and other in self.sessions:
            self._disconnected(other, self.sessions[other])
            peer = self.cluster[other]
            if self.name in peer.sessions:
                peer._if_alive(
                    peer.incarnation,
                    lambda: peer._disconnected(self.name, peer.sessions.get(self.name, 0)),
                )

    def say(self, to: tuple[str, ...], kind: str, message: Any) -> None:
        """Send to those of ``to`` that are connected."""
        world = self.world
        for other in sorted(to):  # sets have no order of their own
            session = self.sessions.get(other)
            if session is not None:
                peer = self.cluster[other]
                world.carry(self.name, other, kind, peer.hear, self.name, session, kind, message)

    def hear(self, sender: str, session: int, kind: str, message: Any) -> None:
        if not self.alive or self.sessions.get(sender) != session:
            return
        if self.world.now_s < self.stopped_until_s:
            self.world.at(self.stopped_until_s, self.hear, sender, session, kind, message)
            return
        if kind == "beat":
            peer, actions = membership.on_beat(self.peers[sender], message, self.clock_s())
            self.peers[sender] = peer
            if actions:
                self._peer_actions(sender, actions)
        elif kind == "election":
            self._event(Heard(sender, message))
        elif kind == "sync":
            self._hear_sync(sender, message)
        elif not self.sluggish_s:
            self.placer.hear(sender, message)
        else:
            self._hear_late(sender, message)

    def _hear_late(self, sender: str, message: Any) -> None:
        """The scheduler has much to do: what comes to it waits its turn, whoever still leads."""
        delay_s = self.sluggish_s * self.world.rng.random()
        self.busy_until_s = max(self.busy_until_s, self.world.now_s + delay_s)
        self._later(self.busy_until_s - self.world.now_s, lambda: self.placer.hear(sender, message))

    # -- the rules -------------------------------------------------------------------------

    def tick(self) -> None:
        self._later(TICK_S / self.speed, self.tick)
        self.ticks += 1
        now_s = self.clock_s()
        for name, peer in list(self.peers.items()):
            actions = membership.check(peer, now_s, self.checked_s, MEMBERSHIP)
            if actions:
                self._peer_actions(name, actions)
        self.checked_s = now_s
        if self.ticks % 4 == 0:
            self.say(tuple(self.sessions), "beat", membership.Beat(self.incarnation, 1))
        if self.ticks % 2 == 0:
            for other in self.cluster:
                if other != self.name and other not in self.sessions:
                    self.dial(other)
        self._event(Tick())
        if self.ticks % 4 == 1:
            self._synced(*sync.step(self.sync, sync.Tick()))
        self.placer.tick()

    def _peer_actions(self, name: str, actions: tuple[membership.Action, ...]) -> None:
        for action in actions:
            match action:
                case membership.Up():
                    self._event(NodeUp(name))
                    self._synced(*sync.step(self.sync, sync.NodeUp(name)))
                case membership.Down():
                    self._event(NodeDown(name))
                    self._synced(*sync.step(self.sync, sync.NodeDown(name)))
                    self.placer.node_down(name)
                case membership.Cut():
                    self._hang_up(name)

    def _event(self, event: Any) -> None:
        before, promise = self.election, self.election.promise
        after, actions = election.step(before, event, self.clock_s())
        released = isinstance(event, Heard) and isinstance(event.message, Resign)
        if after.promise.holder != promise.holder and not released:
            self.watch(self, "turned", after)
        self._elected(after, actions)

    def _elected(self, state: Any, actions: tuple[Any, ...]) -> None:
        before, self.election = self.election, state
        for action in actions:
            match action:
                case Send(to, message):
                    self.say(to, "election", message)
                case Save(promise, roster):
                    self.watch(self, "promise", promise)
                    self.disk.promise, self.disk.roster = promise, roster
                case Changed(leader, _, sure):
                    self.watch(self, "changed", leader)
                    if not state.leading:
                        self._synced(*sync.step(self.sync, sync.Follows()))
                    elif sure:
                        part = sync.Leads(state.leading, state.roster)
                        self._synced(*sync.step(self.sync, part))
        if state.leading:
            self.watch(self, "authority", authority(state, self.clock_s()))
            if state.sure and state.roster is not before.roster:
                part = sync.Leads(state.leading, state.roster)
                self._synced(*sync.step(self.sync, part))
        elif before.leading:
            self.watch(self, "authority", None)

    def _hear_sync(self, sender: str, message: sync.Message) -> None:
        if isinstance(message, sync.Read | sync.Put):
            e = self.election
            if e.leader != sender or e.promise != (message.epoch, sender):
                return
        self._synced(*sync.step(self.sync, sync.Heard(sender, message)))

    def _synced(self, state: sync.State, actions: tuple[sync.Action, ...]) -> None:
        self.sync = state
        for action in actions:
            match action:
                case sync.Send(to, message):
                    self.say(to, "sync", message)
                case sync.Save(disk):
                    self.disk.desired = disk
                case sync.Safe(stamp):
                    self._event(DocumentsSafe(stamp))
                case sync.Ready(document):
                    self.watch(self, "ready", document)
                case sync.Committed(document, _):
                    self.watch(self, "committed", document)

    def wish(self, instance: str) -> None:
        """A user's command arrives at the leader: one more instance."""
        self._event(CommandsSeen(self.election.commands + 1))
        stamp, body = self.sync.disk.document
        assert isinstance(body, tuple)
        self._synced(*sync.step(self.sync, sync.Write(stamp, (*body, instance), instance)))
