"""What the store is fetching: each thing once, in a thread, for all who want it.

A run ends with the last caller that wanted it, and with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a model is.

    Attributes:
        phase: ``waiting``, ``downloading``, ``extracting``, ``verifying`` or ``done``.
        source: which of the card's sources is being tried; empty while there is none.
        total_bytes: 0 while unknown.
    """

    model: str
    phase: str
    source: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


OnProgress = Callable[[Progress], None]
Work = Callable[[OnProgress, threading.Event], Path]  # in a thread; the event: give up


@dataclass(slots=True, eq=False)
class _Job:
    """One download that runs; ``result`` is set on the loop's thread."""

    result: asyncio.Future[Path]
    progress: Progress
    cancelled: threading.Event = field(default_factory=threading.Event)
    listeners: list[OnProgress] = field(default_factory=list)


class Jobs:
    """On the event loop; ``Work`` runs in threads."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, str], _Job] = {}

    def progress(self, model_id: str) -> Progress | None:
        """How far a model is; None if it is not being fetched."""
        found = [job.progress for (id_, _), job in self._jobs.items() if id_ == model_id]
        return next((p for p in found if p.phase != "waiting"), found[0] if found else None)

    def all(self) -> list[Progress]:
        """How far each model is that is being fetched."""
        ids = dict.fromkeys(id_ for id_, _ in self._jobs)
        return [found for id_ in ids if (found := self.progress(id_)) is not None]

    async def run(
        self, model_id: str, key: str, work: Work, on_progress: OnProgress | None
    ) -> Path:
        """What ``work`` returns or raises; run once for all who want the same at a time.

        Args:
            key: tells apart what of a model is wanted.
            on_progress: called on the event loop.
        """
        job = self._jobs.get((model_id, key)) or self._start(model_id, key, work)
        listener = on_progress or _nobody
        job.listeners.append(listener)
        try:
            return await asyncio.shield(job.result)
        finally:
            job.listeners.remove(listener)
            if not job.listeners and not job.result.done():
                job.cancelled.set()
                job.result.cancel()
                self._jobs.pop((model_id, key), None)

    def _start(self, model_id: str, key: str, work: Work) -> _Job:
        loop = asyncio.get_running_loop()
        job = _Job(loop.create_future(), Progress(model=model_id, phase="waiting"))
        self._jobs[model_id, key] = job

        def on_loop(call: Callable[[], None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(call)

        def report(progress: Progress) -> None:
            def tell() -> None:
                job.progress = progress
                for listener in list(job.listeners):
                    listener(progress)

            on_loop(tell)

        def finish(path: Path | None, error: Exception | None) -> None:
            if job.result.done():
                return
            self._jobs.pop((model_id, key), None)
            if error is not None:
                job.result.set_exception(error)
            elif path is not None:
                job.result.set_result(path)

        def run() -> None:
            path, error = None, None
            try:
                path = work(report, job.cancelled)
            except Exception as exc:  # noqa: BLE001 - a thread's edge: goes to whoever waits
                error = exc
            on_loop(lambda: finish(path, error))

        # a daemon: a connection that hangs must not keep a node that stops alive
        threading.Thread(target=run, name=f"fetch {model_id}", daemon=True).start()
        return job


def _nobody(_progress: Progress) -> None:
    pass
