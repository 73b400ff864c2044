"""What must hold at every step, whatever happens to a cluster.

* at most one leader has authority at any instant, and at most one in an epoch ever;
* only that one places, and no machine obeys an epoch older than one it agreed to;
* what a machine agreed to is never taken back; a leader has the coordinator role;
* what was committed is in the document of every later leader;
* a machine that is gone is seen to be gone within 4 s;
* 4 s after the last disturbance every part with a quorum has one leader that all of it follows;
* at last one leader, one document, and each wanted instance exactly once.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from control.election_state import Authority, Promise, State
from control.quorum import Roster, has_quorum
from tests.sim.network import World

if TYPE_CHECKING:
    from tests.sim.machine import Machine

DOWN_S = 4.0
LEADER_S = 4.0
ONCE_S = 7.0
LOOK_S = 0.2


class Violated(AssertionError):
    """An invariant does not hold."""


class Watch:
    """Sees every step of every machine.

    Args:
        single: the machines are one cluster from the start; else clusters meet and merge.
    """

    def __init__(self, world: World, *, single: bool) -> None:
        self.world, self.single = world, single
        self.machines: dict[str, Machine] = {}
        self.quiet_s = 0.0
        self.rights: dict[str, tuple[str, float]] = {}  # who -> lineage, until when in true time
        self.leaders: dict[tuple[str, int], str] = {}
        self.promised: dict[str, int] = {}
        self.committed: set[str] = set()
        self.wished = 0
        self.counts = dict.fromkeys(("won", "committed", "ready", "obeyed", "looks"), 0)

    def __call__(self, m: Machine, what: str, data: Any) -> None:
        match what:
            case "authority":
                self.authority(m, data)
            case "promise":
                self.promise(m, data)
            case "places":
                if not self.has_right(m):
                    self.fail(f"{m.name} gives the command {data} without authority")
                self.knows_all(m)
            case "obeyed":
                self.counts["obeyed"] += 1
                if data.epoch < self.promised.get(m.name, 0):
                    self.fail(f"{m.name} obeys {data}, but agreed to {self.promised[m.name]}")
            case "turned":
                self.keeps_its_word(m, data)
            case "committed":
                self.counts["committed"] += 1
                self.committed.update(data.body)
            case "ready":
                self.counts["ready"] += 1
                if self.has_right(m):
                    self.knows_all(m)
            case "crash":
                self.rights.pop(m.name, None)

    def keeps_its_word(self, m: Machine, after: State) -> None:
        """Bound to a leader, a machine gives an epoch to nobody; it may follow a newer leader."""
        before, holder = m.election, after.promise.holder
        bound = before.held_by not in ("", m.name) and m.clock_s() < before.held_until_s
        if bound and before.held_by != holder and after.leader != holder:
            self.fail(f"{m.name} is bound to {before.held_by} and agrees to {after.promise}")

    def has_right(self, m: Machine) -> bool:
        return self.rights.get(m.name, ("", 0.0))[1] > self.world.now_s

    def knows_all(self, m: Machine) -> None:
        document = m.sync.disk.document
        body: Any = document.body
        lost = self.committed - set(body)
        if self.single and lost:
            self.fail(f"{m.name} leads with {document}: {lost} was committed and is lost")

    def fail(self, text: str) -> None:
        raise Violated(f"at {self.world.now_s:.3f} s: {text}")

    def authority(self, m: Machine, right: Authority | None) -> None:
        if right is None:
            self.rights.pop(m.name, None)
            return
        if not m.candidate:
            self.fail(f"{m.name} leads without the coordinator role")
        now_s, lineage = self.world.now_s, m.election.roster.lineage
        self.rights[m.name] = (lineage, m.true_s(right.until_s))
        for name, (other, until_s) in self.rights.items():
            if name != m.name and until_s > now_s and other == lineage:
                self.fail(f"{m.name} and {name} both have authority, {name} until {until_s:.3f}")
        owner = self.leaders.setdefault((lineage, right.epoch), m.name)
        if owner != m.name:
            self.fail(f"{m.name} leads epoch {right.epoch}, which {owner} has led")
        self.counts["won"] = len(self.leaders)

    def promise(self, m: Machine, promise: Promise) -> None:
        before = m.disk.promise
        if promise.epoch < before.epoch:
            self.fail(f"{m.name} agrees to {promise} after {before}")
        if promise.epoch == before.epoch and before.holder not in ("", promise.holder):
            self.fail(f"{m.name} agrees to two owners: {promise} after {before}")
        self.promised[m.name] = promise.epoch

    # -- from time to time -----------------------------------------------------------------

    def look_again(self) -> None:
        self.counts["looks"] += 1
        self.world.at(self.world.now_s + LOOK_S, self.look_again)
        self.the_dead_are_down()
        quiet_s = self.world.now_s - self.quiet_s
        if quiet_s > LEADER_S and not self.world.cuts:
            for part in self.parts():
                self.has_leader(part)
                if quiet_s > ONCE_S:
                    self.runs_once(part)

    def the_dead_are_down(self) -> None:
        now_s = self.world.now_s
        dead = [m for m in self.machines.values() if not m.alive and now_s - m.died_s > DOWN_S]
        for m in self.machines.values() if dead else ():
            if not self.awake(m) or now_s - m.stopped_until_s <= DOWN_S:
                continue
            for gone in dead:
                late_s = now_s - self.world.last_arrival_s(gone.name, m.name)
                if gone.name in m.election.up and late_s > DOWN_S:
                    self.fail(f"{m.name} thinks that {gone.name} is up")

    def awake(self, m: Machine) -> bool:
        return m.alive and self.world.now_s >= m.stopped_until_s

    def parts(self) -> list[list[Machine]]:
        """The machines that are awake, by part of the partition."""
        parts: dict[int, list[Machine]] = {}
        for m in self.machines.values():
            if self.awake(m):
                parts.setdefault(self.world.group.get(m.name, 0), []).append(m)
        return list(parts.values())

    def has_leader(self, part: list[Machine]) -> None:
        here = {m.name for m in part}
        rosters = {m.election.roster for m in part if m.candidate}
        able = any(has_quorum(r, here & self.loyal(r)) for r in rosters)
        leading = [m for m in part if m.name in self.rights]
        met = len({m.election.roster.lineage for m in part}) == 1
        if not met and not self.single and self.world.now_s - self.quiet_s < ONCE_S:
            return
        if able and len(leading) != 1:
            self.fail(f"{sorted(here)} have {len(leading)} leaders: {self.views(part)}")
        if able and any(m.election.leader != leading[0].name for m in part):
            self.fail(f"not all follow {leading[0].name}: {self.views(part)}")

    def loyal(self, roster: Roster) -> set[str]:
        """Machines of the same cluster: who has gone over to another has no say in this one."""
        lineage = roster.lineage
        return {n for n, m in self.machines.items() if m.election.roster.lineage == lineage}

    def views(self, part: list[Machine]) -> dict[str, str]:
        return {
            m.name: f"{m.election.leader or '-'}/{m.election.promise.epoch}"
            f"/{m.election.roster.lineage[-4:]}{m.election.roster.stamp}"
            for m in part
        }

    def runs_once(self, part: list[Machine]) -> None:
        if not any(m.name in self.rights for m in part):
            return
        seen: dict[str, str] = {}
        for m in part:
            for instance in m.running:
                if instance in seen:
                    self.fail(f"{instance} runs on {seen[instance]} and on {m.name}")
                seen[instance] = m.name

    def at_last(self) -> None:
        """After calm: one leader, one document, everything wanted runs once."""
        part = [m for m in self.machines.values() if m.alive]
        if len(part) != len(self.machines):
            self.fail("the scenario left machines down")
        if not any(m.candidate for m in part):
            return
        self.has_leader(part)
        self.runs_once(part)
        leading = [m for m in part if m.name in self.rights]
        if len(leading) != 1:
            self.fail(f"{len(leading)} leaders at last: {self.views(part)}")
        documents = {m.sync.disk.document for m in part}
        if len(documents) != 1:
            self.fail(f"{len(documents)} documents at last: {documents}")
        wanted: Any = documents.pop().body
        running = {i for m in part for i in m.running}
        if running != set(wanted):
            self.fail(f"runs {sorted(running)}, wanted {sorted(wanted)}")
        if self.single and not self.committed <= set(wanted):
            self.fail(f"{self.committed - set(wanted)} was committed and is lost")
        if len({m.election.roster for m in part}) != 1:
            self.fail(f"not one roster: {self.views(part)}")

    # -- users -----------------------------------------------------------------------------

    def wish(self, rng: Random) -> None:
        """Somebody asks a leader for one more instance."""
        for name in sorted(self.rights):
            m = self.machines[name]
            part = m.sync.leading
            if self.awake(m) and part and part.ready:
                self.wished += 1
                m.wish(f"i{self.wished}")
