"""One OS child in its own process group: started, watched, adopted, killed. No shell, no names.

A child is known by pid and start time together, so that a pid that the system has given
to somebody else is never killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_S = 0.1  # where the system cannot tell us of an exit
REAP_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class OsIdentity:
    """Which process: ``started_s`` is its start time as the system reports it."""

    pid: int
    started_s: float

    @staticmethod
    def of(pid: int) -> OsIdentity | None:
        """Identity of a live pid; None where there is none."""
        try:
            return OsIdentity(pid, psutil.Process(pid).create_time())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_s) < 0.02
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def stopped(self) -> bool:
        """Whether the process is stopped by a signal (one sign that its rank hangs)."""
        try:
            return self.alive() and psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def kill_group(self) -> None:
        """SIGKILL to the process and everything it started. Nothing happens if it is gone."""
        if not self.alive():
            return
        if sys.platform == "win32":
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(self.pid)
                for child in process.children(recursive=True):
                    child.kill()
                process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # children are group leaders: pgid == pid

    async def wait_gone(self, *, timeout_s: float | None) -> bool:
        """Wait until the process has ended; False on time-out."""
        loop = asyncio.get_running_loop()
        deadline_s = None if timeout_s is None else loop.time() + timeout_s
        pid_fd = _open_pid_fd(self.pid)
        try:
            while self.alive():
                left_s = None if deadline_s is None else deadline_s - loop.time()
                if left_s is not None and left_s <= 0:
                    return False
                if pid_fd is None:
                    await asyncio.sleep(POLL_S)
                elif not await _readable(pid_fd, left_s):
                    return not self.alive()
            return True
        finally:
            if pid_fd is not None:
                os.close(pid_fd)


def _open_pid_fd(pid: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


async def _readable(fd: int, timeout_s: float | None) -> bool:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, on_readable)
    try:
        await asyncio.wait_for(ready, timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
    return True


class OsChild:
    """A child of this very process, with its standard input held open."""

    def __init__(self, popen: subprocess.Popen[bytes], identity: OsIdentity) -> None:
        self._popen = popen
        self.identity = identity

    @staticmethod
    def start(argv: Sequence[str], *, first_line: bytes, log_path: Path) -> OsChild:
        """Start ``argv`` in a group of its own; ``first_line`` goes to its standard input.

        Raises:
            OSError: the program could not be started.
        """
        flags = int(getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))  # Windows only
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log_file:
            popen = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=log_file,
                start_new_session=sys.platform != "win32",
                creationflags=flags,
            )
        identity = OsIdentity.of(popen.pid) or OsIdentity(popen.pid, 0.0)
        assert popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: the watcher will say so
            popen.stdin.write(first_line + b"\n")
            popen.stdin.flush()
        return OsChild(popen, identity)

    async def wait(self) -> int:
        """Exit status; negative for a signal. Reaps the child."""
        while not await self.identity.wait_gone(timeout_s=60.0):
            pass
        if sys.platform != "win32":
            # Not reaped yet, so the group's number is still ours: end what it left behind.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.identity.pid, signal.SIGKILL)
        await self.reaped(timeout_s=60.0)
        return self._popen.returncode

    async def reaped(self, *, timeout_s: float) -> bool:
        """Collect the exit status of a child that was killed; False if there is none in time.

        Its first thread may be a zombie some milliseconds before the others are gone.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while self.reap() is None:
            if loop.time() > deadline_s:
                return False
            await asyncio.sleep(REAP_POLL_S)
        return True

    def reap(self) -> int | None:
        """Collect the exit status if there is one; closes the pipe."""
        status = self._popen.poll()
        if status is not None and self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()
        return status
