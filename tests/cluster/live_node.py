"""A real node for tests: `ctl start` in a process group of its own, with its own EPMD port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.waiting import wait_until

READY_S = 90.0
STOP_S = 60.0


@dataclass(slots=True)
class LiveNode:
    """Started by ``start``; ``stop`` leaves nothing running."""

    home: Path
    name: str
    epmd_port: int
    url: str = ""
    heart: subprocess.Popen[str] | None = None
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None
    ready_s: float = 0.0  # from the start of the command to its ready line
    prefix: tuple[str, ...] = ()  # before every command, such as `ip netns exec NAME`
    inside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext  # where it listens
    environ: dict[str, str] = field(default_factory=dict)  # besides ours

    @property
    def env(self) -> dict[str, str]:
        ours = {"ERL_EPMD_PORT": str(self.epmd_port), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **ours, **self.environ}

    @property
    def cookie(self) -> str:
        return (self.home / "cookie").read_text()

    def start(self, *args: str, expect_ready: bool = True) -> LiveNode:
        """Run ``ctl start`` and wait for its ready line (or, without, for its end)."""
        begun_s = time.monotonic()
        self.begin(*args)
        if expect_ready:
            self.wait_ready(1)
            self.ready_s = time.monotonic() - begun_s
        return self

    def begin(self, *args: str) -> None:
        """Run ``ctl start``; wait for nothing."""
        command = [*self.prefix, sys.executable, "-m", "ops.ctl", "start", "--home", str(self.home)]
        command += ["--name", self.name, "--http", "127.0.0.1:0", *args]
        self.heart = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.env,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, args=(self.heart,), daemon=True)
        self.reader.start()

    def wait_ready(self, times: int, timeout_s: float = READY_S) -> None:
        """Wait until the ready line was printed ``times`` times; learn the address from it."""
        heart = self.heart
        assert heart is not None

        def ready_lines() -> list[str]:
            found = [line for line in self.lines if line.startswith("ready:")]
            assert found or heart.poll() is None, "\n".join(self.lines)
            return found if len(found) >= times else []

        try:
            self.url = wait_until(ready_lines, timeout_s, "ready line")[-1].split()[-1]
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n" + "\n".join(self.lines)) from exc

    def _read(self, heart: subprocess.Popen[str]) -> None:
        assert heart.stdout is not None
        with heart.stdout:
            for line in heart.stdout:
                self.lines.append(line.rstrip())

    def ctl(self, *args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run another ``ctl`` command against this node."""
        command = [*self.prefix, sys.executable, "-m", "ops.ctl", *args, "--home", str(self.home)]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.env, timeout=timeout_s, check=False
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("status")
        return found

    def get(self, what: str, timeout_s: float = 10.0) -> Any:
        """The answer of ``GET /cluster/...``."""
        with self.inside():
            answer = httpx.get(f"{self.url}/cluster/{what}", timeout=timeout_s)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def instance(self) -> dict[str, Any]:
        """The only instance."""
        (instance,) = self.status()["instances"]
        return dict(instance)

    def rank_pid(self) -> int:
        return int(self.instance()["ranks"][0]["os_pid"])

    def control_pid(self) -> int:
        return int(json.loads((self.home / "run.json").read_text())["os_pid"])

    def port_pids(self) -> set[int]:
        """OS pids of every compute port that was started for this home and lives."""
        found = set()
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            line = process.info["cmdline"] or []
            if line[-2:] == ["-m", "compute.port"] and self._is_mine(process):
                found.add(process.pid)
        return found

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            logs = {Path(f"/proc/{process.pid}/fd/{fd}").resolve().parent for fd in (1, 2)}
            return self.home / "logs" in logs
        except (psutil.NoSuchProcess, OSError):
            return False

    def stop(self) -> int:
        """SIGTERM, then wait; everything that is left after a failed test is killed."""
        if self.heart is None:
            return 0
        try:
            if self.heart.poll() is None:
                self.heart.send_signal(signal.SIGTERM)
            return self.heart.wait(STOP_S)
        finally:
            pids = self.port_pids()
            if self.heart.poll() is None:
                pids.add(self.heart.pid)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.heart.wait(STOP_S)
            if self.reader is not None:
                self.reader.join(STOP_S)  # every writer of the pipe is gone: it ends


def free_tcp_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
