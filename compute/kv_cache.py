"""Key and value memory: pages of 64 positions, of every layer and head of the shard.

A page that is never written costs address space, not memory.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from compute.errors import OutOfMemory
from compute.page_table import PAGE_TOKENS, PageTable

Floats = npt.NDArray[np.float32]


class KvCache:
    """Float32 keys and values of the compiled kernels.

    Raises OutOfMemory where the system does not even promise so much.

    Attributes:
        data: float32 (pages, layers, kv_heads, 2, 64 * head_dim); keys, then values.
        table: which of them a slot has.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        context_tokens: int,
        num_slots: int,
        num_pages: int,
    ) -> None:
        self.pages_a_slot = -(-context_tokens // PAGE_TOKENS)
        shape = (num_pages, num_layers, num_kv_heads, 2, PAGE_TOKENS * head_dim)
        try:
            self.data: Floats = np.zeros(shape, dtype=np.float32)
        except (MemoryError, ValueError) as exc:  # ValueError: beyond any address space
            what = f"keys and values of {num_pages * PAGE_TOKENS} tokens"
            raise OutOfMemory(what, math.prod(shape) * 4) from exc
        self.table = PageTable(
            pages_a_slot=self.pages_a_slot,
            num_slots=num_slots,
            num_pages=num_pages,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers and heads."""
        return int(self.data[0].nbytes)

    @property
    def memory_bytes(self) -> int:
        """Bytes when every page is full."""
        return int(self.data.nbytes)

    def keys(self, slot: int, layer: int, head: int, stop: int) -> Floats:
        """Keys of positions 0 to ``stop``: float32 (stop, head_dim), a copy."""
        pages = self.data[self.table.numbers[slot], layer, head, 0]
        by_page = pages.reshape(self.pages_a_slot, -1, PAGE_TOKENS).transpose(0, 2, 1)
        by_position: Floats = by_page.reshape(self.pages_a_slot * PAGE_TOKENS, -1)
        return by_position[:stop].copy()

    def values(self, slot: int, layer: int, head: int, stop: int) -> Floats:
        """Values of positions 0 to ``stop``: float32 (stop, head_dim), a copy."""
        pages = self.data[self.table.numbers[slot], layer, head, 1]
        by_position: Floats = pages.reshape(self.pages_a_slot * PAGE_TOKENS, -1)
        return by_position[:stop].copy()
