"""Latency of all-reduce between processes of this machine; prints a JSON list.

``python -m ops.bench.collectives [--backends shm,gloo] [--ranks 2,3] [--floats 576,4096,1048576]``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from typing import Any

TIMEOUT_S = 180.0


def run(
    backend: str, num_ranks: int, *, floats: str, seconds: float, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """Measure one group of processes.

    Returns:
        What rank 0 of ``compute.bench_collectives`` prints.

    Raises:
        RuntimeError: a rank failed; its last words are in the message.
        subprocess.TimeoutExpired: it took longer than ``timeout_s``.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        tcp_port = probe.getsockname()[1]
    command = [sys.executable, "-m", "compute.bench_collectives", "--backend", backend]
    command += ["--ranks", str(num_ranks), "--tcp-port", str(tcp_port), "--floats", floats]
    command += ["--seconds", str(seconds), "--instance", f"bench-{os.getpid()}"]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(num_ranks)
    ]
    try:
        said = [process.communicate(timeout=timeout_s) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(ranks, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank of {backend} failed: {errors.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(said[0][0])
    return result


def main(arguments: list[str] | None = None) -> None:
    """Parse options, measure every group, print."""
    parser = argparse.ArgumentParser(prog="ops.bench.collectives", description=__doc__)
    parser.add_argument("--backends", default="shm,gloo", help="with commas")
    parser.add_argument("--ranks", default="2,3", help="group sizes, with commas")
    parser.add_argument("--floats", default="576,4096,1048576", help="array sizes, with commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each array size")
    given = parser.parse_args(arguments)
    results = [
        run(backend, int(count), floats=given.floats, seconds=given.seconds)
        for backend in given.backends.split(",")
        for count in given.ranks.split(",")
    ]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
