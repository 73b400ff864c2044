"""Meshes of real processes for tests: started, loaded, asked, stopped and killed."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from models.mesh import head_rank

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 100.0


class Mesh:
    """Ranks of one model; leaving the context kills them all."""

    def __init__(self, path: Path, *, tensor: int = 1, pipeline: int = 1, **order: Any) -> None:
        self.order = {
            "instance": "test",
            "epoch": 1,
            "group": secrets.token_hex(16),
            "path": str(path),
            "tensor": tensor,
            "pipeline": pipeline,
            "context_tokens": 512,
            "threads": 1,
            "device": "cpu",
            "join_timeout_s": 60.0,
            "step_timeout_s": 30.0,
            **order,
        }
        self.head = head_rank(tensor, pipeline)
        self._buffers = [b""] * (tensor * pipeline)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.compute.mesh_rank"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for _ in range(tensor * pipeline)
        ]
        self.facts: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.wait(timeout=10)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def load(self, *, ranks: Sequence[int] | None = None) -> Self:
        """Load every rank, or only some; what they answered is in ``facts``."""
        everybody = range(len(self.processes))
        for rank in everybody:
            self.tell(rank, {"prepare": "127.0.0.1"})
        places = [self.hear(rank) for rank in everybody]
        chosen = everybody if ranks is None else ranks
        for rank in chosen:
            self.tell(rank, {"load": {**self.order, "rank": rank, "places": places}})
        self.facts = [self.hear(rank) for rank in chosen]
        return self

    def generate(self, prompts: Sequence[Sequence[int]], count: int, **more: Any) -> Any:
        """Greedy tokens of each prompt."""
        self.tell(self.head, {"generate": [list(p) for p in prompts], "count": count, **more})
        return self.hear(self.head)

    def tell(self, rank: int, command: dict[str, Any]) -> None:
        stream = self.processes[rank].stdin
        assert stream is not None
        stream.write(json.dumps(command).encode() + b"\n")
        stream.flush()

    def hear(self, rank: int) -> Any:
        """The next line of a rank."""
        stream = self.processes[rank].stdout
        assert stream is not None
        deadline_s = time.monotonic() + ANSWER_S
        while b"\n" not in self._buffers[rank]:
            left_s = max(0.0, deadline_s - time.monotonic())
            ready, _, _ = select.select([stream.fileno()], [], [], left_s)
            assert ready, f"rank {rank} gave no answer in {ANSWER_S} s"
            more = os.read(stream.fileno(), 1 << 20)
            assert more, f"rank {rank} has ended"
            self._buffers[rank] += more
        line, _, self._buffers[rank] = self._buffers[rank].partition(b"\n")
        return json.loads(line)

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)
