"""Which pages a stage finds a slot's positions in, as the head's orders say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from compute.stage import Row
from models.footprint import PAGE_TOKENS

__all__ = ["PAGE_TOKENS", "PageTable"]

Longs = npt.NDArray[np.int64]


class PageTable:
    """One table for all layers and heads of a rank; rows change it before they run.

    Until a row says otherwise slot ``i`` has the pages behind those of slot ``i - 1``, from the
    first again where memory ends: for measurements and tests, which plan no memory.

    Attributes:
        numbers: int64 (slots, pages a slot): where page ``i`` of a slot lies in memory.
    """

    def __init__(self, *, pages_a_slot: int, num_slots: int, num_pages: int) -> None:
        self.num_pages = num_pages
        every = np.arange(num_slots * pages_a_slot, dtype=np.int64) % num_pages
        self.numbers: Longs = every.reshape(num_slots, pages_a_slot)

    def follow(self, rows: Sequence[Row]) -> None:
        """Take over what rows say of their pages.

        Raises:
            ValueError: a page that does not exist, or beyond the end of a slot.
        """
        for row in rows:
            if not row.pages:
                continue
            stop = row.first_page + len(row.pages)
            if row.first_page < 0 or stop > self.numbers.shape[1]:
                raise ValueError(
                    f"slot {row.slot}: pages {row.first_page}..{stop - 1} are beyond the "
                    f"{self.numbers.shape[1]} of a slot"
                )
            if min(row.pages) < 0 or max(row.pages) >= self.num_pages:
                raise ValueError(f"slot {row.slot}: pages must be 0..{self.num_pages - 1}")
            self.numbers[row.slot, row.first_page : stop] = row.pages

    def places(self, slot: int, start: int, stop: int) -> Longs:
        """Where positions ``start`` to ``stop`` (not included) lie: int64, in positions."""
        positions = np.arange(start, stop, dtype=np.int64)
        places: Longs = self.numbers[slot, positions // PAGE_TOKENS] * PAGE_TOKENS
        places += positions % PAGE_TOKENS
        return places

    def runs(self, slot: int, start: int, stop: int) -> list[slice]:
        """The same as ranges, joined where pages lie side by side."""
        found: list[slice] = []
        for page in range(start // PAGE_TOKENS, -(-stop // PAGE_TOKENS)):
            at, begin = int(self.numbers[slot, page]) * PAGE_TOKENS, page * PAGE_TOKENS
            first = at + max(start - begin, 0)
            last = at + min(stop - begin, PAGE_TOKENS)
            if found and found[-1].stop == first:
                found[-1] = slice(found[-1].start, last)
            else:
                found.append(slice(first, last))
        return found
