"""Room in the store: what its models take, the quota, and which must go so that another fits.

Models that run, or are being fetched, never go; of the others those go first that were used
longest ago. Without a quota nothing is ever deleted to make room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from control.errors import QuotaExceeded
from control.fetch import free_bytes

log = logging.getLogger("control.model_store")


@dataclass(frozen=True, slots=True)
class Holding:
    """What the store has of one model.

    Attributes:
        folder: its name in the store.
        used_s: when it was last used, in seconds since 1970.
    """

    id: str
    folder: str
    size_bytes: int
    used_s: float


def choose_to_go(
    holdings: Iterable[Holding], need_bytes: int, room_bytes: int, keep: Container[str]
) -> list[Holding] | None:
    """What to delete so that ``need_bytes`` fit in ``room_bytes``, which may be below zero.

    None where that cannot be. ``keep``: folders that stay. Pure.
    """
    gone: list[Holding] = []
    for one in sorted(holdings, key=lambda h: (h.used_s, h.folder)):
        if need_bytes <= room_bytes:
            break
        if one.size_bytes and one.folder not in keep:
            gone.append(one)
            room_bytes += one.size_bytes
    return gone if need_bytes <= room_bytes else None


class Room:
    """The quota of one store. Any thread may call; models are named by their folders."""

    def __init__(
        self,
        root: Path,
        quota_bytes: int | None,
        *,
        holdings: Callable[[], Sequence[Holding]],
        remove: Callable[[str], bool],
    ) -> None:
        """
        Args:
            quota_bytes: what all models may take; None for as much as the disk has.
            remove: deletes what is in a folder; False where it cannot be done now.
        """
        self._root, self.quota_bytes = root, quota_bytes
        self._holdings, self._remove = holdings, remove
        self._lock = threading.Lock()
        self._coming: dict[str, int] = {}  # what models that are being fetched will take
        self._fetches: Counter[str] = Counter()

    @contextlib.contextmanager
    def fetching(self, folder: str) -> Iterator[None]:
        """It is not deleted meanwhile, and what it will take is not given away twice."""
        with self._lock:
            self._fetches[folder] += 1
        try:
            yield
        finally:
            with self._lock:
                self._fetches[folder] -= 1
                if not self._fetches[folder]:
                    del self._fetches[folder]
                    self._coming.pop(folder, None)

    def make(self, folder: str, need_bytes: int, in_use: Callable[[], set[str]]) -> None:
        """See that ``need_bytes`` more of a model fit; delete others where that is needed.

        Args:
            in_use: folders of models that run; asked only if something has to go.

        Raises:
            QuotaExceeded: they cannot fit, with the numbers.
        """
        if self.quota_bytes is None:
            return
        with self._lock:
            held = {one.folder: one for one in self._holdings()}
            mine = held[folder].size_bytes if folder in held else 0
            others = {name: one.size_bytes for name, one in held.items() if name != folder}
            for name, size in self._coming.items():
                if name != folder:
                    others[name] = max(size, others.get(name, 0))
            taken = mine + sum(others.values())
            room = min(self.quota_bytes - taken, free_bytes(self._root))
            if need_bytes > room:
                running = in_use()
                keep = running | self._fetches.keys() | {folder}
                kept = sum(one.size_bytes for name, one in held.items() if name in running)
                refused = QuotaExceeded(folder, need_bytes, self.quota_bytes, taken, kept)
                gone = choose_to_go(held.values(), need_bytes, room, keep)
                if gone is None:
                    raise refused
                for one in gone:
                    if not self._remove(one.folder):
                        raise refused
                    log.warning(
                        "%s (%.1f MB) made room for %s", one.id, one.size_bytes / 1e6, folder
                    )
            if folder in self._fetches:
                self._coming[folder] = mine + need_bytes


def taken_bytes(folder: Path) -> int:
    """What the files below a folder take of the disk; holes take nothing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(base, name))
                blocks = getattr(found, "st_blocks", None)
                total += blocks * 512 if blocks is not None else found.st_size
    return total


def touch(note: Path) -> None:
    """The model of this note is used now."""
    with contextlib.suppress(OSError):
        os.utime(note, (time.time(), time.time()))


def touched_s(note: Path) -> float:
    """When that was last; 0 where nobody knows."""
    try:
        return note.stat().st_mtime
    except OSError:
        return 0.0
