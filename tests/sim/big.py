"""How elections and beats scale: ``python -m tests.sim.big [MACHINES ...]`` prints a table.

Machines of one configuration start within a second; later the leader's machine vanishes. Counted
is what the rules send; a simulated machine does no work besides.
"""

from __future__ import annotations

import resource
import sys
import time
from random import Random

from control.quorum import configured
from tests.sim.invariants import Watch
from tests.sim.machine import Disk, Machine
from tests.sim.network import World

STEP_S = 0.05
PATIENCE_S = 20.0


def settle_s(world: World, machines: list[Machine]) -> float:
    """Seconds until all that live follow one leader that has authority."""
    began_s = world.now_s
    while world.now_s < began_s + PATIENCE_S:
        world.run(world.now_s + STEP_S)
        alive = [m for m in machines if m.alive]
        leaders = {m.election.leader for m in alive}
        if len(leaders) == 1 and any(m.election.sure for m in alive):
            return world.now_s - began_s
    raise TimeoutError(f"no leader within {PATIENCE_S} s of virtual time")


def measure(num: int) -> dict[str, str]:
    """One row of the table."""
    rng = Random(num)
    world = World(rng)
    watch = Watch(world, single=True)
    names = [f"n{i:04d}" for i in range(num)]
    roster = configured(names)
    machines = [
        Machine(
            world,
            name,
            Disk(roster),
            candidate=True,
            offset_s=rng.uniform(0, 1e5),
            speed=rng.uniform(0.99, 1.01),
            watch=watch,
        )
        for name in names
    ]
    watch.machines = {m.name: m for m in machines}
    for m in machines:
        m.cluster = watch.machines
        world.at(rng.random(), m.start)
    began_s = time.perf_counter()
    world.run(1.0)
    start_s = settle_s(world, machines)
    start = sum(world.sent.values())
    world.run(world.now_s + 1.0)  # late connections are there now
    before = dict(world.sent)
    world.run(world.now_s + 2.0)
    calm = {kind: world.sent[kind] - before.get(kind, 0) for kind in world.sent}
    leader = next(m for m in machines if m.election.leading)
    at_leader = calm["election"] - calm["election"] // 2  # its signs; the rest are the answers
    before = dict(world.sent)
    leader.crash(machine=True)
    lost_s = settle_s(world, [m for m in machines if m is not leader])
    fall = world.sent["election"] - before["election"]
    return {
        "machines": str(num),
        "start, s": f"{start_s:.2f}",
        "messages of the start a node": f"{start / num:.0f}",
        "calm: beats a node and second": f"{calm['beat'] / num / 2:.0f}",
        "signs of the leader a second": f"{at_leader / 2:.0f}",
        "leader lost until all follow the next, s": f"{lost_s:.2f}",
        "election messages of that a node": f"{fall / num:.0f}",
        "memory, MiB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}",
        "real time, s": f"{time.perf_counter() - began_s:.0f}",
    }


def main(argv: list[str]) -> None:
    rows: list[dict[str, str]] = []
    for num in map(int, argv or ("10", "100", "1000")):
        row = measure(num)
        if not rows:
            print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row), flush=True)
        rows.append(row)
        print("| " + " | ".join(row.values()) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
