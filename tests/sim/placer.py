"""A small scheduler for simulated machines: asks what runs, starts what is missing, stops doubles.

It obeys what the real one has to: nothing without authority and the committed document, nothing
before every machine that is up has said what it runs, no command of an older epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from control.election_state import authority, fence

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

    def node_down(self, name: str) -> None:
        self.reports.pop(name, None)
        self.starting = {i: told for i, told in self.starting.items() if told[0] != name}

    def hear(self, sender: str, message: Any) -> None:
        if isinstance(message, Report):
            if message.epoch == self.epoch:
                told = {i for i, (name, _) in self.starting.items() if name == sender}
                self.reports[sender] = message.running | told
                for instance in told & message.running:
                    del self.starting[instance]
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
        holders: dict[str, list[str]] = {i: [] for i in wanted}
        for name in sorted(self.reports):
            for instance in self.reports[name]:
                holders.setdefault(instance, []).append(name)
        for instance, names in holders.items():
            if instance in wanted and not names and instance not in self.starting:
                target = min(self.reports, key=lambda n: (len(self.reports[n]), n))
                self.starting[instance] = (target, now_s + START_S)
                self.reports[target] |= {instance}
                self.command(target, Start(self.epoch, instance))
            for name in names[1:] if instance in wanted else names:
                self.command(name, Stop(self.epoch, instance))

    def command(self, name: str, command: Start | Stop) -> None:
        self.m.watch(self.m, "places", command)
        if name == self.m.name:
            self.reports[name] = self.obey(command).running
            self.starting.pop(command.instance, None)
        else:
            self.m.say((name,), "place", command)
