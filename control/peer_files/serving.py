"""What this machine offers to others of one model: its files, checked to be a model, and digests.

Blocking; for threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from control.errors import NotAModel
from control.peer_files.digests import Digests
from control.peer_files.offer import Offer
from control.peer_files.part_copy import PartCopy
from models.checkpoint import open_checkpoint
from models.errors import ModelError
from models.needed import header_ranges, model_files

ABOUT = "about.json"


class Shared(Protocol):
    """One model that others may fetch."""

    @property
    def offer(self) -> Offer:
        """What there is now, without doors."""
        ...

    def open(self, file: int, start: int, length: int) -> contextlib.AbstractContextManager[int]:
        """See ``door.Served``; ``file`` is a number in the order of the offer."""
        ...

    def digests(self, name: str, first: int, count: int) -> bytes:
        """Of chunks in a row. Raises OSError, ValueError."""
        ...


@dataclass(frozen=True, slots=True)
class SharedWhole:
    """A model that is all here. ``notes``: folder where its digests are kept."""

    offer: Offer
    folder: Path
    notes: Path
    _digests: dict[str, Digests]

    @contextlib.contextmanager
    def open(self, file: int, start: int, length: int) -> Iterator[int]:
        """See ``Shared``."""
        name, size = _file_of(self.offer, file)
        if not 0 <= start < start + length <= size:
            raise ValueError(f"bytes {start} to {start + length} of {name}, which has {size}")
        with _opened(self.folder / name) as descriptor:
            yield descriptor

    def digests(self, name: str, first: int, count: int) -> bytes:
        """See ``Shared``."""
        if name not in self._digests:
            raise ValueError(f"{self.offer.id} has no file {name!r}")
        return self._digests[name].of_file(self.folder / name, first, count)


@dataclass(frozen=True, slots=True)
class SharedPart:
    """A model of which parts are here; what has arrived since counts too."""

    copy: PartCopy

    @property
    def offer(self) -> Offer:
        """See ``Shared``."""
        whole = self.copy.offer
        return Offer(
            id=whole.id,
            main=whole.main,
            files=whole.files,
            fingerprint=whole.fingerprint,
            header=whole.header,
            have=self.copy.have(),
        )

    @contextlib.contextmanager
    def open(self, file: int, start: int, length: int) -> Iterator[int]:
        """See ``Shared``."""
        name, _ = _file_of(self.copy.offer, file)
        if not self.copy.has(name, start, start + length):
            raise ValueError(f"bytes {start} to {start + length} of {name} are not here")
        with _opened(self.copy.files / name) as descriptor:
            yield descriptor

    def digests(self, name: str, first: int, count: int) -> bytes:
        """See ``Shared``."""
        known = self.copy.digests.get(name)
        if known is None:
            raise ValueError(f"{self.copy.offer.id} has no file {name!r}")
        found = [known.get(chunk) for chunk in range(first, first + count)]
        if None in found:
            raise ValueError(f"not all of chunks {first} to {first + count} of {name} are here")
        return b"".join(digest for digest in found if digest is not None)


def share(model_id: str, path: Path, notes: Path) -> SharedWhole:
    """Look at a model that is here whole; what has been found out before is used.

    Args:
        path: what ``open_checkpoint`` takes.
        notes: folder for what is found out; of no other model.

    Raises:
        NotAModel: it cannot be opened.
    """
    about = _about(model_id, path, notes)
    offer = Offer(
        id=model_id,
        main="" if path.is_dir() else path.name,
        files=tuple(sorted((name, size) for name, (size, _) in about["files"].items())),
        fingerprint=about["fingerprint"],
        header={n: tuple((a, b) for a, b in ranges) for n, ranges in about["header"].items()},
    )
    digests = {name: Digests(notes / "digests" / name, size) for name, size in offer.files}
    return SharedWhole(offer, path if path.is_dir() else path.parent, notes, digests)


def _about(model_id: str, path: Path, notes: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        about: dict[str, Any] = json.loads((notes / ABOUT).read_text(encoding="utf-8"))
        if about["path"] == str(path) and all(
            _stamp(folder / name) == stamp for name, stamp in about["files"].items()
        ):
            return about
    try:
        checkpoint = open_checkpoint(path)
        found = Offer(
            id=model_id,
            main="" if path.is_dir() else path.name,
            files=tuple((name, 0) for name in model_files(checkpoint)),
            fingerprint=checkpoint.fingerprint,
            header=header_ranges(checkpoint),
        )
        about = about_of(path, found)
    except (OSError, ModelError) as exc:
        raise NotAModel(model_id, str(exc)) from exc
    with contextlib.suppress(OSError):  # a full disk: it is looked at again next time
        note_about(notes, about)
    return about


def about_of(path: Path, offer: Offer) -> dict[str, Any]:
    """What is noted of a model at ``path``; sizes and times are those of now. Raises OSError."""
    folder = path if path.is_dir() else path.parent
    return {
        "path": str(path),
        "fingerprint": offer.fingerprint,
        "header": offer.header,
        "files": {name: _stamp(folder / name) for name, _ in offer.files},
    }


def note_about(notes: Path, about: dict[str, Any]) -> None:
    """Keep what was found out, and none of the digests of what was there before."""
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    new = notes / f"{ABOUT}.new"
    new.write_text(json.dumps(about), encoding="utf-8")
    new.replace(notes / ABOUT)


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _file_of(offer: Offer, number: int) -> tuple[str, int]:
    if number >= len(offer.files):
        raise ValueError(f"{offer.id} has no file {number}")
    return offer.files[number]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        yield descriptor
    finally:
        os.close(descriptor)
