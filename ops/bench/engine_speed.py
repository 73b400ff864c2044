"""Engine speed for several thread counts, each in a process of its own; prints a JSON list.

``python -m ops.bench.engine_speed MODEL [--threads 1,2] [--device cpu]``. The first line of a
fresh machine includes the kernels' compilation in ``load_s``; later ones do not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 600.0


def run(model: Path, *, threads: int, device: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Measure one thread count.

    Returns:
        What ``compute.bench_engine`` prints, and ``process_s``: its whole run, imports included.

    Raises:
        RuntimeError: the measuring process failed; its last words are in the message.
        subprocess.TimeoutExpired: it took longer than ``timeout_s``.
    """
    command = [sys.executable, "-m", "compute.bench_engine", str(model)]
    command += ["--threads", str(threads), "--device", device]
    start_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    result["process_s"] = round(time.perf_counter() - start_s, 2)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Parse options, measure every thread count, print."""
    parser = argparse.ArgumentParser(prog="ops.bench.engine_speed", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file or a folder with safetensors")
    parser.add_argument("--threads", default="1,2", help="thread counts, with commas")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    counts = [int(count) for count in given.threads.split(",")]
    results = [run(given.model, threads=count, device=given.device) for count in counts]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
