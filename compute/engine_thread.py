"""The thread that owns the engine: takes commands, steps the worker, hands events back.

Numbers are crunched here so that the port's event loop always answers beats and
cancels. Everything that touches the engine runs on this one thread, so the worker
needs no locks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from compute.follower import Follower
from compute.worker import Done, Load, Submit, Token, Worker

R = TypeVar("R")
Event = Token | Done
Emit = Callable[[Sequence[Event]], None]


class EngineThread:
    """Runs a Worker on a thread of its own.

    Args:
        emit: called on this thread with the events of each step.
        on_crash: called on this thread with the exception that ended it; the port then
            exits, since an engine in an unknown state must not answer.
    """

    def __init__(self, *, emit: Emit, on_crash: Callable[[BaseException], None]) -> None:
        self._emit = emit
        self._on_crash = on_crash
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._follower: Follower | None = None
        self.steps = 0  # progress counter, read by the beat
        self.busy = False  # True while a step runs; loading may take its time
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run(self, job: Callable[[], R]) -> Future[R]:
        """Run ``job`` on the engine thread, between steps."""
        future: Future[R] = Future()

        def command() -> None:
            try:
                future.set_result(job())
            except Exception as exc:  # noqa: BLE001 - handed to the caller of the future
                future.set_exception(exc)

        self._commands.put(command)
        return future

    def set_worker(self, worker: Worker | None) -> None:
        """Give the thread a loaded worker (call on the engine thread, through ``run``)."""
        self._worker = worker

    def set_follower(self, follower: Follower | None) -> None:
        """Let the thread follow a head from now on, or no more (call on the engine thread)."""
        self._follower = follower

    def load(self) -> Load | None:
        """How much the worker has to do; None without one (call on the engine thread)."""
        return None if self._worker is None else self._worker.load()

    def submit(self, request: Submit) -> None:
        self._commands.put(lambda: self._submit(request))

    def cancel(self, request_id: Hashable) -> None:
        self._commands.put(lambda: self._worker.cancel(request_id) if self._worker else None)

    def _submit(self, request: Submit) -> None:
        if self._worker is None:
            self._emit([Done(request.request_id, "error", "no model is loaded in this port")])
            return
        try:
            self._worker.submit(request)
        except ValueError as exc:  # a request the worker refuses ends alone
            self._emit([Done(request.request_id, "error", str(exc))])

    def _run(self) -> None:
        try:
            while True:
                self._drain()
                if self._follower is not None:
                    self.busy = True
                    self._follower.step()
                    self.steps += 1
                if self._worker is not None and not self._worker.idle:
                    self.busy = True
                    events = self._worker.step()
                    self.steps += 1
                    if events:
                        self._emit(events)
        except BaseException as exc:  # noqa: BLE001 - reported; the port ends on it
            self._on_crash(exc)

    def _drain(self) -> None:
        """Run waiting commands; block for one when there is nothing to step."""
        self.busy = False
        idle = self._is_idle()
        while True:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return
            command()
            self.steps += 1
            idle = self._is_idle()

    def _is_idle(self) -> bool:
        """Whether there is nothing to step; a follower always waits for its head."""
        return self._follower is None and (self._worker is None or self._worker.idle)
