"""Who has which page of key/value memory, and which pages hold a text that may come again.

The head decides for all ranks: their memories have pages of the same numbers. A page holds
``PAGE_TOKENS`` positions of one text. It is *held* by every sequence that reads or writes it;
once all of its positions are known it is *remembered* under its tokens and the page before it, so
that another sequence which begins alike holds the same page instead of computing it again. A
remembered page that nobody holds is kept until its room is needed: the one not used for longest
goes first, and of one text the end before the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.footprint import PAGE_TOKENS

ROOT = 0  # stands for the page before the first
Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Known:
    """A remembered page.

    Attributes:
        page: its number.
        text: stands for everything from the first token to its last; never used twice.
    """

    page: int
    text: int


class Pages:
    """All pages of an instance's memory. Each is free, held or kept; no I/O, no clock."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"{num_pages} pages hold nothing")
        self.num_pages = num_pages
        self._free = np.ones(num_pages, dtype=np.bool_)
        self._num_free = num_pages
        self._holders = [0] * num_pages
        self._known: dict[Key, Known] = {}
        self._keys: dict[int, Key] = {}  # of remembered pages
        self._kept: dict[int, None] = {}  # remembered and held by nobody, by time of last use
        self._last_text = ROOT

    @property
    def num_available(self) -> int:
        """Pages that :meth:`take` could give."""
        return self._num_free + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Pages that hold a text nobody uses now."""
        return len(self._kept)

    def take(self, count: int, *, behind: int = -1) -> list[int]:
        """Hold ``count`` pages whose contents do not matter, side by side as far as can be.

        Args:
            behind: the page that they follow in their sequence; -1 at its beginning.

        Raises:
            ValueError: fewer are available.
        """
        if count > self.num_available:
            raise ValueError(f"{count} pages wanted, {self.num_available} available")
        while self._num_free < count:
            self._forget(next(iter(self._kept)))
        taken: list[int] = []
        for _ in range(count):
            page = behind + 1 if behind >= 0 else self.num_pages
            if page >= self.num_pages or not self._free[page]:
                page = self._start()
            self._free[page] = False
            self._num_free -= 1
            self._holders[page] = 1
            taken.append(page)
            behind = page
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """No longer hold pages of one sequence, given in its order."""
        for page in reversed(pages):  # so that of a text the end is given up before the beginning
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._keys:
                    self._kept[page] = None
                else:
                    self._free[page] = True
                    self._num_free += 1

    def find(self, before: int, ids: tuple[int, ...]) -> Known | None:
        """The page with these tokens behind the text ``before``, without holding it."""
        return self._known.get((before, ids))

    def hold(self, page: int) -> None:
        """Hold a remembered page, beside whoever holds it."""
        self._kept.pop(page, None)
        self._holders[page] += 1

    def remember(self, page: int, before: int, ids: tuple[int, ...]) -> Known:
        """Let others find a held page; its positions are being written and never change.

        Returns:
            What is remembered of that text: another page where there was one already.
        """
        assert len(ids) == PAGE_TOKENS
        key = (before, ids)
        known = self._known.get(key)
        if known is None:
            self._last_text += 1
            known = self._known[key] = Known(page, self._last_text)
            self._keys[page] = key
        return known

    def _forget(self, page: int) -> None:
        del self._known[self._keys.pop(page)], self._kept[page]
        self._free[page] = True
        self._num_free += 1

    def _start(self) -> int:
        """Where a sequence goes on that cannot where it is: in the longest run of free pages, in
        whose middle, so that what ends before the run can grow too."""
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        starts, stops = edges[::2], edges[1::2]
        longest = int(np.argmax(stops - starts))
        start, stop = int(starts[longest]), int(stops[longest])
        return start if start == 0 else (start + stop) // 2
