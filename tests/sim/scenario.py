"""What a seed means: machines, settings, and the disturbances that befall them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from control.quorum import Roster, alone, configured
from tests.sim.invariants import Watch
from tests.sim.machine import Disk, Machine
from tests.sim.network import World

CALM_S = 11.0  # after the last disturbance: a leader, then one state
MODES = ("configured", "agreed", "fresh")


@dataclass
class Scenario:
    """A cluster under test.

    Attributes:
        mode: its roster is configured, or was agreed before, or the machines never met.
    """

    seed: int
    mode: str
    world: World
    machines: list[Machine]
    watch: Watch
    log: list[str]
    end_s: float = 0.0  # when the last disturbance has ended

    def say(self, text: str) -> None:
        self.log.append(f"{self.world.now_s:7.3f} {text}")

    def run(self) -> None:
        """Until it is over and calm has come. Raises Violated."""
        while self.world.now_s < (stop_s := max(self.end_s, self.watch.quiet_s) + CALM_S):
            self.world.run(stop_s)
        self.watch.at_last()

    # -- disturbances ----------------------------------------------------------------------

    def disturb(self) -> None:
        """Something happens now; what ends it is put on the clock."""
        rng = self.world.rng
        kind = rng.choice(DISTURBANCES)
        kind(self, rng)
        self.quiet_from(self.world.now_s)

    def quiet_from(self, time_s: float) -> None:
        self.watch.quiet_s = max(self.watch.quiet_s, time_s)

    def later(self, delay_s: float, act: Callable[[], None], *, unrest: bool = False) -> None:
        """Call ``act`` then; with ``unrest`` the cluster cannot settle before."""

        def then() -> None:
            act()
            self.quiet_from(self.world.now_s)

        time_s = self.world.now_s + delay_s
        self.world.at(time_s, then)
        self.end_s = max(self.end_s, time_s)
        if unrest:
            self.quiet_from(time_s)

    def leader(self) -> Machine | None:
        return next((m for m in self.machines if m.alive and m.election.leading), None)

    def kill(self, m: Machine, how: str, back_s: float) -> None:
        if not m.alive:
            return
        self.say(f"{m.name} {how}, back in {back_s:.2f} s")
        m.leave() if how == "leaves" else m.crash(machine=how == "vanishes")
        self.later(back_s, lambda: self.boot(m))

    def boot(self, m: Machine) -> None:
        if not m.alive:
            self.say(f"{m.name} starts")
            m.start()
            self.quiet_from(self.world.now_s)

    def split(self, groups: dict[str, int], heal_s: float) -> None:
        self.say(f"split {groups}, healed in {heal_s:.2f} s")
        self.world.group = groups
        self.later(heal_s, self.heal)

    def heal(self) -> None:
        self.say("links are whole")
        self.world.group, self.world.cuts = {}, set()
        self.world.release()
        self.quiet_from(self.world.now_s + 0.3)


def _how_long(rng: Random) -> float:
    """Seconds of a disturbance: shorter than it takes to notice, about so, or to settle in."""
    return rng.choice((rng.uniform(0.05, 2.5), rng.uniform(2.5, 4.5), rng.uniform(6, 12)))


def _crash_one(s: Scenario, rng: Random) -> None:
    how = rng.choice(("vanishes", "crashes", "leaves"))
    s.kill(rng.choice(s.machines), how, _how_long(rng))


def _crash_leader(s: Scenario, rng: Random) -> None:
    m = s.leader()
    if m is not None:
        s.kill(m, rng.choice(("vanishes", "crashes", "leaves")), _how_long(rng))


def _crash_many(s: Scenario, rng: Random) -> None:
    for m in rng.sample(s.machines, rng.randint(1, len(s.machines))):
        s.kill(m, rng.choice(("vanishes", "crashes")), _how_long(rng))


def _split(s: Scenario, rng: Random) -> None:
    num = rng.choice((2, 2, 2, 3))
    s.split({m.name: rng.randrange(num) for m in s.machines}, _how_long(rng))


def _isolate_leader(s: Scenario, rng: Random) -> None:
    m = s.leader()
    if m is not None:
        with_it = {m.name, rng.choice(s.machines).name}
        s.split({o.name: int(o.name in with_it) for o in s.machines}, _how_long(rng))


def _cut_links(s: Scenario, rng: Random) -> None:
    names = [m.name for m in s.machines]
    cuts = {(rng.choice(names), rng.choice(names)) for _ in range(rng.randint(1, 2 * len(names)))}
    s.say(f"one-way cuts {sorted(cuts)}")
    s.world.cuts = cuts
    s.later(rng.uniform(0.3, 6), s.heal)


def _lose(s: Scenario, rng: Random) -> None:
    s.world.loss = rng.uniform(0.02, 0.4)
    s.say(f"loss {s.world.loss:.2f}")
    s.later(rng.uniform(0.5, 4), lambda: setattr(s.world, "loss", 0.0), unrest=True)


def _slow(s: Scenario, rng: Random) -> None:
    s.world.slow_s = rng.uniform(0.1, 3)
    s.say(f"slow {s.world.slow_s:.2f} s")

    def over() -> None:
        s.world.slow_s = 0.0
        s.quiet_from(s.world.latest_arrival_s)

    s.later(rng.uniform(0.5, 3), over, unrest=True)


def _stop_one(s: Scenario, rng: Random) -> None:
    m = s.leader() if rng.random() < 0.5 else rng.choice(s.machines)
    if m is not None and m.alive:
        pause_s = rng.uniform(0.3, 6)
        s.say(f"{m.name} is stopped for {pause_s:.2f} s")
        m.stopped_until_s = max(m.stopped_until_s, s.world.now_s + pause_s)
        s.later(pause_s, lambda: None, unrest=True)


def _slow_schedulers(s: Scenario, rng: Random) -> None:
    late = rng.sample(s.machines, rng.randint(1, len(s.machines)))
    s.say(f"slow schedulers on {', '.join(m.name for m in late)}")
    for m in late:
        m.sluggish_s = rng.uniform(0.5, 5)

    def over() -> None:
        for m in late:
            m.sluggish_s = 0.0
            s.quiet_from(m.busy_until_s)

    s.later(rng.uniform(1, 6), over, unrest=True)


def _lose_sight(s: Scenario, rng: Random) -> None:
    """The leader and one other do not see each other; who sees both starts again meanwhile."""
    leader = s.leader()
    if leader is None or s.world.cuts:
        return
    blind = rng.choice([m for m in s.machines if m is not leader])
    s.say(f"no link between {leader.name} and {blind.name}")
    s.world.cuts = {(leader.name, blind.name), (blind.name, leader.name)}
    for m in s.machines:
        if m not in (leader, blind):
            back_s = rng.uniform(0.02, 0.5)
            s.later(rng.uniform(3.2, 5), partial(s.kill, m, "crashes", back_s))
    s.later(7, s.heal)


def _stop_leader_for_a_hold(s: Scenario, rng: Random) -> None:
    """It comes back just when its followers become free, and connections end under it."""
    m = s.leader()
    if m is None:
        return
    pause_s, trouble_s = rng.uniform(2.6, 3.6), rng.uniform(2.0, 4.5)
    s.say(f"the leader {m.name} is stopped for {pause_s:.2f} s, loss for {trouble_s:.2f} s")
    m.stopped_until_s = max(m.stopped_until_s, s.world.now_s + pause_s)
    s.world.loss = rng.choice((0.0, rng.uniform(0.05, 0.4)))
    for other in s.machines:
        if other is not m:
            s.later(pause_s + rng.uniform(0, 0.5), partial(m.reset, other.name), unrest=True)
    s.later(trouble_s, lambda: setattr(s.world, "loss", 0.0), unrest=True)


DISTURBANCES = (
    _stop_leader_for_a_hold,
    _stop_leader_for_a_hold,
    _slow_schedulers,
    _lose_sight,
    _crash_one,
    _crash_leader,
    _crash_many,
    _split,
    _isolate_leader,
    _cut_links,
    _lose,
    _slow,
    _stop_one,
)


def make(seed: int) -> Scenario:
    """The scenario of a seed, with all it will suffer on the clock."""
    rng = Random(seed)
    size = rng.random()
    num = (
        rng.randint(2, 5)
        if size < 0.8
        else rng.randint(6, 9)
        if size < 0.96
        else rng.randint(10, 20)
        if size < 0.992
        else rng.randint(21, 50)
    )
    mode = rng.choices(MODES, (5, 4, 2))[0] if num <= 9 else "configured"
    names = [f"n{i:02d}" for i in range(num)]
    candidates = {n for n in names if rng.random() < 0.8} or {rng.choice(names)}
    breaker = rng.choice(names)
    together = configured(names, breaker if rng.random() < 0.5 else "")
    if mode == "agreed":
        together = Roster("first", (0, 0), tuple(names), breaker)
    world = World(rng)
    watch = Watch(world, single=mode != "fresh")
    machines = [
        Machine(
            world,
            name,
            Disk(alone(name, str(i)) if mode == "fresh" else together),
            candidate=name in candidates,
            offset_s=rng.uniform(0, 1e5),
            speed=rng.uniform(0.98, 1.02),
            watch=watch,
        )
        for i, name in enumerate(names)
    ]
    by_name = {m.name: m for m in machines}
    watch.machines = by_name
    scenario = Scenario(seed, mode, world, machines, watch, [])
    scenario.say(
        f"{num} machines, {mode}, tie-breaker {together.tie_breaker}, candidates "
        f"{', '.join(sorted(candidates))}"
    )
    for m in machines:
        m.cluster = by_name
        world.at(rng.random(), scenario.boot, m)
    _schedule(scenario, rng, num)
    world.at(1.0, watch.look_again)
    return scenario


def _schedule(s: Scenario, rng: Random, num: int) -> None:
    s.quiet_from(1.0)
    trouble_s = s.end_s = rng.uniform(3, 10 if num < 10 else 5)
    for _ in range(rng.randint(1, 6)):
        s.world.at(rng.uniform(1, trouble_s), s.disturb)
    for _ in range(16):
        s.world.at(rng.uniform(1.5, trouble_s + 6), s.watch.wish, rng)
