"""Worker processes that tests lead through groups: started once, joined again and again."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 45.0
START_S = 60.0  # a process that imports much on a busy machine
_epochs = itertools.count(1)


class RankProcess:
    """One worker process, with a pipe each way."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.compute.collective_worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.pid = self._process.pid
        self._buffer = b""

    def tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline_s = time.monotonic() + ANSWER_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"rank process {self.pid} gave no answer in {ANSWER_S} s"
            more = os.read(fd, 1 << 20)
            assert more, f"rank process {self.pid} has ended"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.wait(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Ranks:
    """A pool of processes, grouped anew for each test."""

    def __init__(self) -> None:
        self._pool: list[RankProcess] = []

    def take(self, count: int) -> list[RankProcess]:
        while len(self._pool) < count:
            self._pool.append(RankProcess())
        return self._pool[:count]

    def lose(self, *processes: RankProcess) -> None:
        """End processes; others take their places."""
        for process in processes:
            process.end()
            self._pool.remove(process)

    def close(self) -> None:
        self.lose(*self._pool)


class World:
    """A group of processes, one rank each."""

    def __init__(
        self,
        processes: Sequence[RankProcess],
        backend: str,
        *,
        hosts: Sequence[str] = (),
        epoch: int = 0,
        timeout_s: float = 30.0,
        ring: Sequence[int] = (),
    ) -> None:
        self.processes = list(processes)
        self.epoch = epoch or next(_epochs)
        self.options = {
            "instance": f"test-{os.getpid()}",
            "epoch": self.epoch,
            "hosts": list(hosts) or ["a"] * len(processes),
            "timeout_s": timeout_s,
            "backend": backend,
            "ring": list(ring),
            "tcp_port": 0,
        }

    def start_join_first(self) -> None:
        """Tell rank 0 to join; its answer is still to be heard."""
        first = self.processes[0]
        if self.options["backend"] not in ("shm", "single"):
            first.tell({"listen": True})
            self.options["tcp_port"] = first.hear()["tcp_port"]
        first.tell({"join": {**self.options, "rank": 0}})

    def start_join_others(self) -> None:
        """Tell the other ranks to join."""
        for rank, process in enumerate(self.processes[1:], start=1):
            process.tell({"join": {**self.options, "rank": rank}})

    def join(self) -> World:
        self.start_join_first()
        self.start_join_others()
        for rank, answer in enumerate(self.hear()):
            assert answer.get("rank") == rank, answer
        return self

    def tell(self, **command: Any) -> None:
        for process in self.processes:
            process.tell(command)

    def hear(self) -> list[dict[str, Any]]:
        return [process.hear() for process in self.processes]

    def run(self, **command: Any) -> list[list[npt.NDArray[Any]]]:
        """An operation on every rank; the arrays each one has after it."""
        self.tell(**command)
        return self.run_answers(command.get("dtype", "float32"))

    def run_answers(self, dtype: str = "float32") -> list[list[npt.NDArray[Any]]]:
        """The arrays each rank has after an operation it was told."""
        answers = self.hear()
        for answer in answers:
            assert "bits" in answer, answer
        return [
            [np.frombuffer(base64.b64decode(text), dtype=dtype) for text in answer["bits"]]
            for answer in answers
        ]

    def close(self) -> None:
        self.tell(close=True)
        self.hear()


def socket_lines(world: World) -> list[str]:
    """Sockets of the meeting of a world: the one that listens, and what is connected to it."""
    lines = Path("/proc/net/unix").read_text().split("\n")
    return [line for line in lines if "phalanx-" in line and line.endswith(f"-{world.epoch}")]


def memory_names() -> set[str]:
    """What of ours has a name in the system's shared memory or among its sockets."""
    names = {path.name for path in Path("/dev/shm").glob("*phalanx*")}
    sockets = Path("/proc/net/unix").read_text().split("\n")
    return names | {line.split()[-1] for line in sockets if "phalanx" in line}


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on just now."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def now_s() -> float:
    """The clock that all processes of a machine share."""
    return time.monotonic()
