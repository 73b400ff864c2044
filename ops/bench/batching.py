"""Streams side by side, and beside a long prompt, in a process of its own; prints JSON.

``python -m ops.bench.batching MODEL [--threads 2] [--device cpu] [--runs 1]``. Figures are tokens a
second of 1, 4 and 16 streams, and how long two running streams wait from token to token in quiet
and while a prompt of 4,096 tokens arrives, with their ratio. On a machine that does other things
only the ratio means something, and that of the best of several runs most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 1200.0


def run(model: Path, options: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """What ``compute.bench_batching`` prints.

    Raises:
        RuntimeError: the measuring process failed; its last words are in the message.
        subprocess.TimeoutExpired: it took longer than ``timeout_s``.
    """
    command = [sys.executable, "-m", "compute.bench_batching", str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Parse options, measure, print. What is not known here is an option of the measurement."""
    parser = argparse.ArgumentParser(prog="ops.bench.batching", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file or a folder with safetensors")
    parser.add_argument("--runs", type=int, default=1)
    given, options = parser.parse_known_args(arguments)
    print(json.dumps([run(given.model, options) for _ in range(given.runs)], indent=1))


if __name__ == "__main__":
    main()
