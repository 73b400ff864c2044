"""Run seeds: ``python -m tests.sim.replay SEED``, or ``FIRST LAST`` (LAST not included)."""

from __future__ import annotations

import sys
import time
from collections import Counter

from tests.sim.scenario import make


def run_seed(seed: int) -> dict[str, int]:
    """Run one scenario to its end. Raises Violated, with the line that runs it again."""
    scenario = make(seed)
    watch = scenario.watch
    try:
        scenario.run()
    except Exception as exc:
        exc.add_note("\n".join(scenario.log))
        exc.add_note(f"replay: python -m tests.sim.replay {seed}")
        raise
    sent = sum(scenario.world.sent.values())
    return {**watch.counts, "machines": len(scenario.machines), "messages": sent}


def main(argv: list[str]) -> int:
    first = int(argv[0])
    seeds = range(first, int(argv[1]) if len(argv) > 1 else first + 1)
    total: Counter[str] = Counter()
    bad = []
    began_s = time.perf_counter()
    for seed in seeds:
        try:
            total.update(run_seed(seed))
        except Exception as exc:  # noqa: BLE001 - each seed is judged on its own
            bad.append(seed)
            print(f"seed {seed}: {type(exc).__name__}: {exc}")
            if len(seeds) == 1:
                print("\n".join(exc.__notes__))
    took_s = time.perf_counter() - began_s
    print(f"{len(seeds)} seeds in {took_s:.1f} s, {len(bad)} failed {bad[:20]}; {dict(total)}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
