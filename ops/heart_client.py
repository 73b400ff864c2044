"""The control process's end of heart: says that its loop runs, notices that heart is gone.

The numbers in ``PHALANX_HEART_FDS`` are two pipe ends (see ``ops/heart.py``). Without heart, as in
tests or under another service manager, everything here does nothing.

Three things end a process whose heart was killed. The end of the pipe sets ``gone``: stop in good
order. On Linux the kernel sends SIGTERM as well. And a thread, which needs no running loop, kills
the own process group ``grace_s`` later.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import MutableMapping

from ops.heart import ALIVE, FDS_VARIABLE, READY

_PR_SET_PDEATHSIG = 1  # Source: prctl(2)


class HeartClient:
    """Beats to heart, and its death as an event. Make it with ``from_env`` inside the loop."""

    def __init__(self, fds: tuple[int, int] | None, *, grace_s: float = 8.0) -> None:
        self.gone = asyncio.Event()
        self.present = fds is not None
        self._grace_s = grace_s
        self._ready = False
        self._closed = threading.Event()
        self._beat_fd: int | None = None
        if fds is None:
            return
        alive_fd, self._beat_fd = fds
        if sys.platform != "win32":
            os.set_blocking(self._beat_fd, False)
            faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        _set_death_signal(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        watch = threading.Thread(
            target=self._watch, args=(alive_fd, loop), name="heart-watch", daemon=True
        )
        watch.start()

    @classmethod
    def from_env(
        cls, environ: MutableMapping[str, str] | None = None, *, grace_s: float = 8.0
    ) -> HeartClient:
        """The client of the heart named in the environment, which forgets it: no grandchild's.

        Args:
            grace_s: seconds from heart's death to the kill of this process group.

        Raises:
            ValueError: the variable does not hold two numbers.
            OSError: the numbers are no open pipes.
        """
        text = (os.environ if environ is None else environ).pop(FDS_VARIABLE, None)
        if text is None:
            return cls(None, grace_s=grace_s)
        numbers = [int(number) for number in text.split(",")]
        if len(numbers) != 2:
            raise ValueError(f"{FDS_VARIABLE}={text!r}: want two numbers, as ops/heart.py sets")
        return cls(_own(numbers[0], numbers[1]), grace_s=grace_s)

    def ready(self) -> None:
        """Tell heart that the node serves: from now on a death is not an early one."""
        self._ready = True
        self._write(READY)

    async def beat(self, *, every_s: float = 1.0) -> None:
        """Write a byte every ``every_s`` seconds until heart is gone or the task is cancelled.

        From the first beat on heart kills this process when its loop is blocked for too long.
        """
        while not self.gone.is_set():
            self._write(READY if self._ready else ALIVE)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.gone.wait(), every_s)

    def close(self) -> None:
        """Say that this process ends in good order: the death of heart no longer hurries it."""
        self._closed.set()
        if self.present:
            _set_death_signal(0)

    def _write(self, byte: bytes) -> None:
        if self._beat_fd is None:
            return
        try:
            os.write(self._beat_fd, byte)
        except BlockingIOError:
            return  # heart is stopped (SIGSTOP), the pipe full: it will read old beats first
        except OSError:
            self.gone.set()

    def _watch(self, alive_fd: int, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(OSError):
            while os.read(alive_fd, 1):
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(self.gone.set)
        if self._closed.wait(self._grace_s):
            return
        print(f"heart is gone and {self._grace_s:.0f} s are over: killed", file=sys.stderr)
        if sys.platform != "win32" and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(128 + signal.SIGTERM)


def _own(alive: int, beat: int) -> tuple[int, int]:
    """The two descriptors, closed in any program that this one starts."""
    if sys.platform == "win32":
        import msvcrt

        for handle in (alive, beat):
            os.set_handle_inheritable(handle, False)
        return (
            msvcrt.open_osfhandle(alive, os.O_RDONLY),
            msvcrt.open_osfhandle(beat, os.O_WRONLY),
        )
    for fd in (alive, beat):
        os.set_inheritable(fd, False)
    return alive, beat


def _set_death_signal(number: int) -> None:
    """Have the kernel send ``number`` when the parent dies; elsewhere the pipe does it alone."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    # On failure (a seccomp filter) the pipe alone does the work too.
    done = libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) == 0
    if done and number and os.getppid() != parent:
        os.kill(os.getpid(), number)  # heart died in between: no signal will come
