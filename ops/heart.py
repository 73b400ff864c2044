"""The tiny OS parent of a node: keeps one child process alive, as OTP's ``heart`` does.

Standard library alone, and no asyncio: what watches the control process must not share its faults.

- The child leads its own process group; when it dies, what is left of the group is killed.
  (Compute ports lead groups of their own: they outlive it and are adopted.)
- Two pipes, their numbers in ``PHALANX_HEART_FDS``. The child reads one and sees its end when heart
  is gone, whatever killed it; it writes into the other: ``R`` once ready, ``.`` every second.
- A child that was heard and then is silent for ``silent_s`` has a blocked loop: SIGUSR1 makes it
  print the stack of every thread (``ops/heart_client.py``), then its group is killed and it starts
  again.
- An abnormal death is followed by a new start after a pause that doubles. A child that dies
  ``max_early_deaths`` times in a row without ever being ready ends heart with its exit status.
- SIGTERM, SIGINT and SIGHUP are passed on and mean: stop. Whatever status follows is the last.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Final, TypeAlias

FDS_VARIABLE: Final = "PHALANX_HEART_FDS"
READY: Final = b"R"
ALIVE: Final = b"."

STOPPED, REFUSED, BAD_CONFIGURATION, NO_NODE = range(4)  # ctl's exit statuses

LAST_WORDS_S = 0.5  # a grandchild that holds the pipe must not delay a restart for longer
# Windows wakes a waiting main thread for Ctrl-C only between waits.
_LONGEST_WAIT_S: Final = 1.0 if sys.platform == "win32" else 3600.0
_DUMP_S: Final = 1.0  # for the stacks of a blocked child to be written


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When heart restarts, waits, kills and gives up.

    Attributes:
        silent_s: longest silence of a child that has been heard before.
        stop_s: time to stop after a signal was passed on, before the kill.
        first_pause_s: before the first restart; doubles up to ``longest_pause_s`` and starts over
            after a child that was ready for ``steady_s``.
        max_early_deaths: deaths in a row without ``ready`` after which heart gives up.
    """

    silent_s: float = 30.0
    stop_s: float = 120.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 30.0
    steady_s: float = 10.0
    max_early_deaths: int = 5


@dataclass(frozen=True, slots=True)
class _Exited:
    run: int
    status: int  # negative: the signal that killed it


@dataclass(frozen=True, slots=True)
class _Heard:
    run: int
    ready: bool


@dataclass(frozen=True, slots=True)
class _Signal:
    number: int


_Event: TypeAlias = _Exited | _Heard | _Signal


@dataclass(slots=True)
class _Child:
    """One run of the child and heart's ends of its two pipes."""

    run: int
    process: subprocess.Popen[bytes]
    alive_fd: int  # never written; closing it tells the child that heart is gone
    heard_s: float | None = None
    ready_s: float | None = None
    dumped: bool = False


@dataclass(slots=True)
class History:
    """What earlier runs say about the next one; ``after_death`` is the whole restart rule."""

    limits: Limits
    ever_ready: bool = False
    early_deaths: int = 0
    pause_s: float = field(default=0.0)

    def is_final(self, status: int, *, was_ready: bool) -> bool:
        """Whether ``status`` is an answer of the program and not the death of a node.

        1 is also what an uncaught exception leaves, 2 what a full disk may: they are answers only
        before the node served.
        """
        if status in (REFUSED, BAD_CONFIGURATION):
            return not (was_ready or self.ever_ready)
        return status in (STOPPED, NO_NODE)

    def after_death(self, *, ready_for_s: float | None) -> float | None:
        """Pause in seconds before the next start; None gives up.

        Args:
            ready_for_s: how long the dead run had been ready; None: it never was.
        """
        limits = self.limits
        if ready_for_s is None:
            self.early_deaths += 1
            if self.early_deaths >= limits.max_early_deaths:
                return None
        else:
            self.ever_ready, self.early_deaths = True, 0
            if ready_for_s >= limits.steady_s:
                self.pause_s = 0.0
        doubled_s = 2 * self.pause_s or limits.first_pause_s
        self.pause_s = min(doubled_s, limits.longest_pause_s)
        return self.pause_s


def run(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, limits: Limits | None = None
) -> int:
    """Run ``argv`` until it stops for good; return the exit status for heart's own process.

    Must be called in the main thread (it takes over SIGTERM, SIGINT and SIGHUP until it returns).

    Args:
        argv: program and arguments of the child; no secret belongs here.
        env: the child's environment; None: heart's own.

    Raises:
        OSError: the program cannot be started at all.
    """
    return _Heart(list(argv), dict(os.environ if env is None else env), limits or Limits()).run()


class _Heart:
    def __init__(self, argv: list[str], env: dict[str, str], limits: Limits) -> None:
        self._argv, self._env, self._limits = argv, env, limits
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._runs = 0
        self._stop_at_s: float | None = None  # set once asked to stop
        self._stop_signal = 0
        self._child: _Child | None = None

    def run(self) -> int:
        before = {number: signal.signal(number, self._on_signal) for number in _signals()}
        try:
            return self._keep_alive()
        finally:
            if self._child is not None:
                _kill_group(self._child.process)
                self._bury(self._child)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _keep_alive(self) -> int:
        history = History(self._limits)
        while True:
            child = self._start()
            status = self._watch(child)
            ended_s = time.monotonic()
            was_ready = child.ready_s is not None
            if self._stop_at_s is not None:
                return status if status >= 0 else 128 - status
            if history.is_final(status, was_ready=was_ready):
                return status
            why = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            what = f"heart: process {child.process.pid} {why}"
            pause_s = history.after_death(
                ready_for_s=None if child.ready_s is None else ended_s - child.ready_s
            )
            if pause_s is None:
                _say(f"{what}; {history.early_deaths} deaths before it was ready: giving up")
                return status if status >= 0 else 128 - status
            _say(f"{what}; starting it again in {pause_s:.1f} s")
            if self._stopped_within(pause_s):
                return STOPPED

    def _start(self) -> _Child:
        self._runs += 1
        alive_read, alive_write = os.pipe()
        beat_read, beat_write = os.pipe()
        try:
            process = _spawn(self._argv, self._env, alive_read, beat_write)
        except BaseException:
            os.close(alive_write)
            os.close(beat_read)
            raise
        finally:
            os.close(alive_read)
            os.close(beat_write)
        child = self._child = _Child(self._runs, process, alive_write)
        listener = threading.Thread(target=self._listen, args=(child, beat_read), daemon=True)
        waiter = threading.Thread(target=self._wait, args=(child, listener), daemon=True)
        for thread in (listener, waiter):
            thread.start()
        return child

    def _listen(self, child: _Child, beat_read: int) -> None:
        with contextlib.suppress(OSError):
            while beats := os.read(beat_read, 4096):
                self._events.put(_Heard(child.run, READY in beats))
        os.close(beat_read)

    def _wait(self, child: _Child, listener: threading.Thread) -> None:
        status = child.process.wait()
        listener.join(LAST_WORDS_S)  # that it was ready may still be in the pipe
        self._events.put(_Exited(child.run, status))

    def _watch(self, child: _Child) -> int:
        """Until ``child`` is dead: note beats, pass signals on, kill it if it is silent."""
        if self._stop_at_s is not None:  # the signal came while it was being started
            _send(child.process, self._stop_signal)
        while True:
            deadline_s = self._deadline_s(child)
            try:
                event = self._events.get(timeout=_wait_s(deadline_s))
            except Empty:
                if deadline_s is not None and time.monotonic() >= deadline_s:
                    self._overdue(child)
                continue
            match event:
                case _Exited(run, status) if run == child.run:
                    self._bury(child)
                    return status
                case _Heard(run, ready) if run == child.run:
                    child.heard_s, child.dumped = time.monotonic(), False
                    if ready and child.ready_s is None:
                        child.ready_s = child.heard_s
                case _Signal(number):
                    self._asked_to_stop(number)
                    _send(child.process, number)

    def _deadline_s(self, child: _Child) -> float | None:
        deadlines_s = []
        if child.heard_s is not None:
            deadlines_s.append(child.heard_s + self._limits.silent_s + _DUMP_S * child.dumped)
        if self._stop_at_s is not None:
            deadlines_s.append(self._stop_at_s)
        return min(deadlines_s, default=None)

    def _overdue(self, child: _Child) -> None:
        pid = child.process.pid
        if self._stop_at_s is not None and time.monotonic() >= self._stop_at_s:
            _say(
                f"heart: process {pid} did not stop within {self._limits.stop_s:.0f} s: killing it"
            )
        elif hasattr(signal, "SIGUSR1") and not child.dumped:
            _say(f"heart: process {pid} was silent for {self._limits.silent_s:.1f} s; its stacks:")
            child.dumped = True
            _send(child.process, signal.SIGUSR1)
            return
        else:
            _say(f"heart: process {pid} is blocked: killing it")
        _kill_group(child.process)
        child.heard_s = None
        if self._stop_at_s is not None:
            self._stop_at_s = time.monotonic() + self._limits.stop_s

    def _stopped_within(self, pause_s: float) -> bool:
        end_s = time.monotonic() + pause_s
        while self._stop_at_s is None and time.monotonic() < end_s:
            with contextlib.suppress(Empty):
                event = self._events.get(timeout=_wait_s(end_s))
                if isinstance(event, _Signal):
                    self._asked_to_stop(event.number)
        return self._stop_at_s is not None

    def _asked_to_stop(self, number: int) -> None:
        self._stop_signal = number
        if self._stop_at_s is None:
            self._stop_at_s = time.monotonic() + self._limits.stop_s

    def _bury(self, child: _Child) -> None:
        _kill_group(child.process)
        child.process.wait()
        os.close(child.alive_fd)
        self._child = None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._events.put(_Signal(number))  # SimpleQueue.put is reentrant


def _signals() -> list[int]:
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _wait_s(deadline_s: float | None) -> float:
    if deadline_s is None:
        return _LONGEST_WAIT_S
    return min(max(deadline_s - time.monotonic(), 0.0), _LONGEST_WAIT_S)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not kill the node
        print(text, file=sys.stderr, flush=True)


if sys.platform == "win32":
    import msvcrt

    def _spawn(
        argv: list[str], env: dict[str, str], alive_read: int, beat_write: int
    ) -> subprocess.Popen[bytes]:
        handles = [msvcrt.get_osfhandle(fd) for fd in (alive_read, beat_write)]
        for handle in handles:
            os.set_handle_inheritable(handle, True)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": handles})
        env = {**env, FDS_VARIABLE: f"{handles[0]},{handles[1]}"}
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            startupinfo=startup,
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
        )

    def _send(process: subprocess.Popen[bytes], number: int) -> None:
        # The one polite signal that reaches another group; the child sees SIGBREAK.
        with contextlib.suppress(OSError):
            process.send_signal(signal.CTRL_BREAK_EVENT)

    def _kill_group(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError):
            process.kill()

else:

    def _spawn(
        argv: list[str], env: dict[str, str], alive_read: int, beat_write: int
    ) -> subprocess.Popen[bytes]:
        env = {**env, FDS_VARIABLE: f"{alive_read},{beat_write}"}
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,  # a background group must not read the terminal
            pass_fds=(alive_read, beat_write),
            process_group=0,
        )

    def _send(process: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    def _kill_group(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
