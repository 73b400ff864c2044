"""A small scheduler for simulated machines: asks what runs, starts what is missing, stops doubles.

What is missing and what is surplus the real rule decides (``control.reconcile``); where something
starts matters to no invariant. It obeys what the real scheduler has to: nothing without authority
and the committed document, nothing before every machine that is up has said what it runs, no
command of an older epoch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge.term import Atom, Pid
from control.books import Record
from control.desired import Desired, Wanted
from control.election_state import authority, fence
from control.reconcile import Running, Verdict, reconcile
from tests.control.specs import spec

if TYPE_CHECKING:
    from tests.sim.machine import Machine


START_S = 2.0


class Ask(NamedTuple):
    """What do you run?"""

    epoch: int


class Start(NamedTuple):
    """Run this too."""

    epoch: int
    instance: str


class Stop(NamedTuple):
    """Run this no more."""

    epoch: int
    instance: str


class Report(NamedTuple):
    """I run these."""

    epoch: int
    running: frozenset[str]


class Placer:
    """The leader's and the follower's part of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.m = machine
        self.epoch = 0
        self.reports: dict[str, frozenset[str]] = {}
        self.starting: dict[str, tuple[str, float]] = {}  # instance -> who was told, until when
        self.settled: Any = None  # what was compared when nothing was to do

    def node_down(self, name: str) -> None:
        self.reports.pop(name, None)
        self.starting = {i: told for i, told in self.starting.items() if told[0] != name}

    def hear(self, sender: str, message: Any) -> None:
        if isinstance(message, Report):
            if message.epoch == self.epoch:
                self.reports[sender] = message.running
                self.forget_started(sender)
            return
        self.m.say((sender,), "place", self.obey(message))

    def obey(self, command: Ask | Start | Stop) -> Report:
        newest = self.m.election.promise.epoch
        if not isinstance(command, Ask) and fence(newest, command.epoch):
            self.m.watch(self.m, "obeyed", command)
            if isinstance(command, Start):
                self.m.running.add(command.instance)
            else:
                self.m.running.discard(command.instance)
        return Report(command.epoch, frozenset(self.m.running))

    def tick(self) -> None:
        m, part = self.m, self.m.sync.leading
        right = authority(m.election, m.clock_s())
        if right is None or part is None or not part.ready or part.epoch != right.epoch:
            self.epoch = 0
            return
        if self.epoch != right.epoch:
            self.epoch, self.reports, self.starting = right.epoch, {}, {}
        up, now_s = m.election.up, m.clock_s()
        self.starting = {i: told for i, told in self.starting.items() if now_s < told[1]}
        self.reports[m.name] = frozenset(m.running)
        if m.ticks % 4 == 2 or not up <= self.reports.keys():
            m.say(tuple(up), "place", Ask(self.epoch))
        if part.busy or not up <= self.reports.keys():
            return
        wanted: Any = m.sync.disk.document.body
        compared = (wanted, dict(self.reports), dict(self.starting))
        if compared == self.settled:
            return
        verdict = self.verdict(wanted)
        for record in verdict.missing:
            target = min(self.reports, key=lambda n: (self.load(n), n))
            self.starting[record.id] = (target, now_s + START_S)
            self.command(target, Start(self.epoch, record.id))
        for one in verdict.surplus:
            self.command(one.node, Stop(self.epoch, one.spec.id))
        self.settled = None if verdict.missing or verdict.surplus else compared

    def verdict(self, wanted: tuple[str, ...]) -> Verdict:
        """What the real rule makes of the reports. What nobody wants has been unloaded."""
        running = [
            running_at(name, instance)
            for name in sorted(self.reports)
            for instance in sorted(self.reports[name])  # sets have no order of their own
        ]
        gone = tuple(sorted({one.spec.id for one in running}.difference(wanted)))
        known = {
            instance: Record(
                instance, "m", Wanted(instance, "m"), state="loading", spec=spec(instance, name)
            )
            for instance, (name, _) in self.starting.items()
        }
        return reconcile(running, desired_with(wanted, gone), known)

    def load(self, name: str) -> int:
        """How many instances it has, or is about to."""
        told = sum(1 for other, _ in self.starting.values() if other == name)
        return len(self.reports[name]) + told

    def forget_started(self, name: str) -> None:
        """What it was told to start it runs now."""
        for instance in self.reports[name]:
            if self.starting.get(instance, ("", 0.0))[0] == name:
                del self.starting[instance]

    def command(self, name: str, command: Start | Stop) -> None:
        self.m.watch(self.m, "places", command)
        if name == self.m.name:
            self.reports[name] = self.obey(command).running
            self.forget_started(name)
        else:
            self.m.say((name,), "place", command)


@lru_cache(maxsize=4096)
def running_at(name: str, instance: str) -> Running:
    return Running(name, spec(instance, name), Pid(Atom(name), 1, 0, 1), 1)


@lru_cache(maxsize=4096)
def desired_with(wanted: tuple[str, ...], gone: tuple[str, ...]) -> Desired:
    return Desired(1, "", tuple(Wanted(instance, "m") for instance in wanted), gone)
