"""One fetch of a model, or of a part of it, from peers: whom, what is missing, publish.

Blocking; for a thread of its own.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from control.catalogue import ModelRef, Shelf
from control.errors import (
    ChecksumMismatch,
    ControlError,
    NoSource,
    NotAModel,
)
from control.fetch import check_sha256, disk_errors, need_space
from control.peer_files import chunks
from control.peer_files.offer import FileRanges, Offer
from control.peer_files.part import Part
from control.peer_files.part_copy import PartCopy
from control.peer_files.pull import Pull
from control.peer_files.serving import about_of, note_about
from control.peer_files.source import Peers, Source, source_of
from models.card import PackageSource
from models.checkpoint import open_checkpoint
from models.errors import ModelError
from models.needed import merged, needed_ranges
from models.part_note import PART_NOTE

log = logging.getLogger("control.peer_files")

OFFER_S: Final = 70.0
LATE_S: Final = 2.0  # for the others, once one peer has answered
Report = Callable[[str, int, int], None]  # phase, bytes so far, bytes in all


class PeerFetch:
    """``run`` once."""

    def __init__(
        self,
        shelf: Shelf,
        ref: ModelRef,
        part: Part,
        names: Sequence[str],
        peers: Peers,
        *,
        begin: float,
        make_room: Callable[[int], None],
        started: Callable[[PartCopy], None],
        report: Report,
        cancelled: threading.Event,
    ) -> None:
        """
        Args:
            names: nodes to fetch from, best first.
            begin: see ``board.Board``.
            make_room: called with the bytes that will come, before the first does.
            started: told of the copy that grows, so that it can be passed on meanwhile.
        """
        self._shelf, self._ref, self._part = shelf, ref, part
        self._names, self._peers = tuple(dict.fromkeys(names)), peers
        self._begin, self._make_room, self._started = begin, make_room, started
        self._report, self._cancelled = report, cancelled
        self._lock = threading.Lock()

    def run(self) -> Path:
        """What to open: the whole model once all of it is here, else the copy of its parts.

        Raises:
            DownloadFailed: (NoSource, ChecksumMismatch) nobody has what is missing.
            NotAModel: the part asked for cannot be of this model.
            DiskFull, StoreUnusable, QuotaExceeded, Cancelled.
        """
        root = self._shelf.parts(self._ref.id)
        copy = PartCopy.opened(root)
        if copy is not None and not self._lacks(copy, self._part.kind):
            return self._finish(copy)
        offers = self._offers()
        first = next(
            (o for o in offers.values() if copy is not None and o.is_same_model(copy.offer)),
            next(iter(offers.values())),
        )
        if copy is None or not first.is_same_model(copy.offer):
            need_space(root, 1)
            copy = PartCopy.created(root, replace(first, id=self._ref.id))
        self._started(copy)
        sources = [
            source_of(name, offer) for name, offer in offers.items() if offer.is_same_model(first)
        ]
        for other in offers.keys() - {source.peer for source in sources}:
            log.warning("%s has another model under the name %s", other, self._ref.id)
        self._fetch(copy, copy.offer.header, sources)
        if self._part.kind != "header":
            self._fetch(copy, self._wanted(copy), sources)
        return self._finish(copy)

    def _lacks(self, copy: PartCopy, kind: str) -> bool:
        """Whether peers have to be asked at all."""
        if any(copy.missing(name, ranges) for name, ranges in copy.offer.header.items()):
            return True
        return kind != "header" and any(
            copy.missing(name, ranges) for name, ranges in self._wanted(copy).items()
        )

    def _offers(self) -> dict[str, Offer]:
        """Of all peers that answer, in the order given. Raises NoSource, DownloadFailed."""
        arrived: queue.Queue[tuple[str, Offer | ControlError]] = queue.Queue()

        def ask(name: str) -> None:
            try:
                arrived.put((name, self._peers.offer(name)))
            except ControlError as exc:
                arrived.put((name, exc))

        for name in self._names:
            threading.Thread(target=ask, args=(name,), daemon=True).start()
        answers: dict[str, Offer | ControlError] = {}
        deadline_s = time.monotonic() + OFFER_S
        with suppress(queue.Empty):
            while len(answers) < len(self._names):
                name, answer = arrived.get(timeout=max(0.0, deadline_s - time.monotonic()))
                answers[name] = answer
                if isinstance(answer, Offer):
                    deadline_s = min(deadline_s, time.monotonic() + LATE_S)
        found = {n: a for n in self._names if isinstance(a := answers.get(n), Offer)}
        if not found:
            reasons = tuple(
                (f"peer {n}", str(answers.get(n, "it does not answer"))) for n in self._names
            )
            raise NoSource(self._ref.id, reasons)
        return found

    def _wanted(self, copy: PartCopy) -> FileRanges:
        """The ranges of the part, the header's among them."""
        match self._part.kind:
            case "whole":
                return {name: ((0, size),) for name, size in copy.offer.files if size}
            case "header":
                return copy.offer.header
            case "ranges":
                unknown = sorted(self._part.ranges.keys() - copy.sizes.keys())
                if unknown:
                    raise NotAModel(self._ref.id, f"it has no file {unknown[0]!r}")
                return self._part.ranges
            case "shard":
                return self._shards(copy)

    def _shards(self, copy: PartCopy) -> FileRanges:
        found: dict[str, tuple[tuple[int, int], ...]] = {}
        try:
            checkpoint = open_checkpoint(copy.path)
            for one in self._part.shards:
                needed = needed_ranges(checkpoint, one.shard(checkpoint))
                for name, ranges in needed.items():
                    found[name] = merged((*found.get(name, ()), *ranges))
        except (ModelError, ValueError) as exc:
            raise NotAModel(self._ref.id, str(exc)) from exc
        return found

    def _fetch(self, copy: PartCopy, wanted: FileRanges, sources: Sequence[Source]) -> None:
        missing = {name: copy.missing(name, ranges) for name, ranges in wanted.items()}
        missing = {name: found for name, found in missing.items() if found}
        if not missing:
            return
        need = _size(missing, copy.sizes)
        whole = {n: chunks.touched(ranges, copy.sizes[n]) for n, ranges in wanted.items()}
        total = _size(whole, copy.sizes)
        done = total - need
        self._make_room(need)
        need_space(copy.root, need)
        self._report("downloading", done, total)

        def on_bytes(size: int) -> None:
            nonlocal done
            with self._lock:
                done += size
                self._report("downloading", done, total)

        pull = Pull(
            copy,
            missing,
            sources,
            self._peers,
            begin=self._begin,
            on_bytes=on_bytes,
            cancelled=self._cancelled,
        )
        try:
            pull.run()
        finally:
            copy.save(clean=False)

    def _finish(self, copy: PartCopy) -> Path:
        self._report("verifying", 1, 1)
        copy.save(clean=True)
        if not copy.is_whole():
            return copy.path
        self._check_card(copy)
        main = copy.offer.main
        source = "peer " + ", ".join(self._names)
        path = self._shelf.publish(self._ref.id, copy.files, source, main=main)
        folder = path.parent if main else path
        with suppress(OSError):
            (folder / PART_NOTE).unlink(missing_ok=True)
            notes = self._shelf.notes(self._ref.id)
            note_about(notes, about_of(path, copy.offer))
            shutil.move(copy.root / "digests", notes / "digests")
        self._shelf.whole_instead_of_parts(self._ref.id)
        return path

    def _check_card(self, copy: PartCopy) -> None:
        """Against what the card promises, where it does. Raises ChecksumMismatch."""
        for source in self._ref.sources:
            if isinstance(source, PackageSource) and source.file == copy.offer.main:
                try:
                    check_sha256(copy.path, source.sha256, self._ref.id, self._cancelled)
                except ChecksumMismatch:
                    with disk_errors(copy.root):
                        shutil.rmtree(copy.root, ignore_errors=True)
                    raise


def _size(found: Mapping[str, Sequence[int]], sizes: Mapping[str, int]) -> int:
    return sum(
        stop - start
        for name, numbers in found.items()
        for start, stop in chunks.as_ranges(numbers, sizes[name])
    )
