"""Times all-reduces as one rank of a group: ``python -m compute.bench_collectives --rank R ...``.

All ranks are started alike; rank 0 prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any, get_args

import numpy as np

from compute.collectives import Backend, Group, Rendezvous, join

OPERATION_S = 30.0


def measure(group: Group, num_floats: int, *, budget_s: float) -> dict[str, Any]:
    """Repeat one sum for about ``budget_s``; latencies in milliseconds as this rank sees them."""
    x = np.ones(num_floats, dtype=np.float32)
    start_s = time.perf_counter()
    for _ in range(3):
        group.all_reduce_sum(x, timeout_s=OPERATION_S)
    count = np.array([budget_s / max(1e-6, (time.perf_counter() - start_s) / 3)], dtype=np.float32)
    group.broadcast(count, root=0, timeout_s=OPERATION_S)  # all ranks repeat equally often
    times_s = []
    for _ in range(min(5000, max(5, int(count[0])))):
        x[:] = 1
        start_s = time.perf_counter()
        group.all_reduce_sum(x, timeout_s=OPERATION_S)
        times_s.append(time.perf_counter() - start_s)
    if x[0] != group.world_size:
        raise RuntimeError(f"a sum of {group.world_size} ones was {x[0]}")
    times_s.sort()
    return {
        "floats": num_floats,
        "times": len(times_s),
        "median_ms": round(statistics.median(times_s) * 1e3, 4),
        "mean_ms": round(statistics.mean(times_s) * 1e3, 4),
        "p99_ms": round(times_s[int(len(times_s) * 0.99)] * 1e3, 4),
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse options, join, measure, print."""
    parser = argparse.ArgumentParser(prog="compute.bench_collectives", description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--backend", choices=get_args(Backend), required=True)
    parser.add_argument("--instance", required=True)
    parser.add_argument("--tcp-port", type=int, default=0)
    parser.add_argument("--floats", default="576,4096,1048576", help="sizes, with commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each size")
    given = parser.parse_args(arguments)
    rendezvous = Rendezvous(
        instance=given.instance,
        epoch=1,
        rank=given.rank,
        hosts=("here",) * given.ranks,
        address=("127.0.0.1", given.tcp_port),
        timeout_s=60.0,
    )
    start_s = time.perf_counter()
    group = join(rendezvous, backend=given.backend)
    join_s = time.perf_counter() - start_s
    sizes = [measure(group, int(size), budget_s=given.seconds) for size in given.floats.split(",")]
    group.barrier(timeout_s=OPERATION_S)
    group.close()
    if given.rank == 0:
        result = {"backend": given.backend, "ranks": given.ranks, "join_s": round(join_s, 2)}
        print(json.dumps({**result, "all_reduce": sizes}))


if __name__ == "__main__":
    main()
