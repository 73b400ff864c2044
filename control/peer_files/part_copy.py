"""A model of which parts are here: sparse files of full size, and a note of what is in them.

::

    <root>/.parts/<model>/files/...            what ``open_checkpoint`` opens, with the note
    <root>/.parts/<model>/digests/<file>       32 bytes for each chunk that is here

Only chunks that have been checked are written, and a chunk counts as here only by the note. A
note that says ``clean`` was written after its chunks had reached the disk; without, as after a
kill or a power cut, every chunk that has a digest is read and checked again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from control.fetch import disk_errors
from control.peer_files import chunks
from control.peer_files.digests import Digests
from control.peer_files.offer import FileRanges, Offer
from models.part_note import PART_NOTE

NOTE_PERIOD_S: Final = 0.5


class PartCopy:
    """Chunks are added by any thread."""

    def __init__(self, root: Path, offer: Offer, have: Mapping[str, set[int]]) -> None:
        """Use ``created`` and ``opened``. ``offer`` is what the copy is of, without doors."""
        self.root, self.offer = root, offer
        self.sizes = dict(offer.files)
        self._have = {name: set(have.get(name, ())) for name in self.sizes}
        self._lock = threading.Lock()
        self._noted_s = 0.0
        self.digests = {
            name: Digests(root / "digests" / name, size) for name, size in self.sizes.items()
        }

    @classmethod
    def created(cls, root: Path, offer: Offer) -> PartCopy:
        """A new one that has nothing, in place of whatever was there. Raises DiskFull etc."""
        with disk_errors(root):
            shutil.rmtree(root, ignore_errors=True)
            for name, size in offer.files:
                path = root / "files" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    file.truncate(size)
        copy = cls(root, offer, {})
        copy.save(clean=False)
        return copy

    @classmethod
    def opened(cls, root: Path) -> PartCopy | None:
        """What was left of one, checked; None where there is nothing to go on with."""
        copy, clean = cls._noted(root)
        if copy is not None and not clean:
            copy._check_again()
        return copy

    @classmethod
    def noted(cls, root: Path) -> PartCopy | None:
        """The same by the note alone: to be told of, not to be read or added to."""
        return cls._noted(root)[0]

    @classmethod
    def _noted(cls, root: Path) -> tuple[PartCopy | None, bool]:
        try:
            note = json.loads((root / "files" / PART_NOTE).read_text(encoding="utf-8"))
            offer = Offer(
                id=note["id"],
                main=note["main"],
                files=tuple(sorted((str(n), int(s)) for n, s in note["files"].items())),
                fingerprint=note["fingerprint"],
                header=_ranges(note["header"]),
            )
            have = _ranges(note["have"])
            whole = all(
                (root / "files" / name).stat().st_size == size for name, size in offer.files
            )
            clean = bool(note["clean"]) and note["chunk_bytes"] == chunks.CHUNK_BYTES
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, False
        if not whole:
            return None, False
        sizes = dict(offer.files)
        return cls(root, offer, {n: chunks.covered(r, sizes[n]) for n, r in have.items()}), clean

    @property
    def path(self) -> Path:
        """What ``open_checkpoint`` takes."""
        return self.files / self.offer.main if self.offer.main else self.files

    @property
    def files(self) -> Path:
        """The folder of the model's files."""
        return self.root / "files"

    def missing(self, name: str, ranges: chunks.Ranges) -> list[int]:
        """Chunks of a file that hold any of ``ranges`` and are not here."""
        have = self._have[name]
        return [n for n in chunks.touched(ranges, self.sizes[name]) if n not in have]

    def has(self, name: str, start: int, stop: int) -> bool:
        """Whether all of these bytes are here."""
        return name in self._have and not self.missing(name, ((start, stop),))

    def have(self) -> FileRanges:
        """What is here."""
        with self._lock:
            return {
                name: chunks.as_ranges(have, self.sizes[name])
                for name, have in self._have.items()
                if have
            }

    def is_whole(self) -> bool:
        """Whether every chunk is here."""
        return all(
            len(have) == chunks.num_chunks(self.sizes[name]) for name, have in self._have.items()
        )

    def have_bytes(self) -> int:
        """Bytes that are here."""
        return sum(stop - start for ranges in self.have().values() for start, stop in ranges)

    def add(self, name: str, first: int, digests: bytes) -> None:
        """Chunks in a row have been checked and written. Raises OSError."""
        self.digests[name].put(first, digests)
        with self._lock:
            self._have[name].update(range(first, first + len(digests) // chunks.DIGEST_BYTES))
            due = time.monotonic() - self._noted_s > NOTE_PERIOD_S
        if due:
            self.save(clean=False)

    def save(self, *, clean: bool) -> None:
        """Write the note; ``clean``: after all chunks. Raises DiskFull, StoreUnusable."""
        note: dict[str, Any] = {
            "id": self.offer.id,
            "main": self.offer.main,
            "files": self.sizes,
            "fingerprint": self.offer.fingerprint,
            "chunk_bytes": chunks.CHUNK_BYTES,
            "header": self.offer.header,
            "have": self.have(),
            "clean": clean,
        }
        with disk_errors(self.root):
            if clean:
                for name in self.sizes:
                    _sync(self.files / name)
            with self._lock:
                new = self.files / f"{PART_NOTE}.new"
                new.write_text(json.dumps(note), encoding="utf-8")
                if clean:
                    _sync(new)
                new.replace(self.files / PART_NOTE)
                self._noted_s = time.monotonic()

    def _check_again(self) -> None:
        for name, size in self.sizes.items():
            good: set[int] = set()
            with contextlib.suppress(OSError), (self.files / name).open("rb") as file:
                for chunk in sorted(self.digests[name].known()):
                    start, stop = chunks.span(chunk, 1, size)
                    file.seek(start)
                    if chunks.digest_of(file.read(stop - start)) == self.digests[name].get(chunk):
                        good.add(chunk)
            self._have[name] = good


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _ranges(found: Mapping[str, Any]) -> FileRanges:
    return {
        str(name): tuple((int(start), int(stop)) for start, stop in ranges)
        for name, ranges in found.items()
    }
