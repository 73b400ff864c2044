"""Key and value memory: pages of 64 positions, and which page of which slot lies where.

A page holds its positions of every layer and head of the shard, so that memory is touched in the
order in which a sequence grows: a slot that is never filled costs address space, not memory.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from compute.errors import OutOfMemory

Floats = npt.NDArray[np.float32]
PAGE_TOKENS = 64


class KvCache:
    """Float32 keys and values of some slots.

    Raises OutOfMemory where the system does not even promise so much.

    Attributes:
        data: float32 (pages, layers, kv_heads, 2, 64 * head_dim); keys, then values.
        page_numbers: int64 (slots, pages a slot): where page ``i`` of a slot lies in ``data``.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        context_tokens: int,
        num_slots: int,
    ) -> None:
        self.pages_a_slot = -(-context_tokens // PAGE_TOKENS)
        num_pages = self.pages_a_slot * num_slots
        shape = (num_pages, num_layers, num_kv_heads, 2, PAGE_TOKENS * head_dim)
        try:
            self.data: Floats = np.zeros(shape, dtype=np.float32)
        except (MemoryError, ValueError) as exc:  # ValueError: beyond any address space
            what = f"keys and values of {num_slots} slots of {context_tokens} tokens"
            raise OutOfMemory(what, math.prod(shape) * 4) from exc
        self.page_numbers: npt.NDArray[np.int64] = np.arange(num_pages, dtype=np.int64).reshape(
            num_slots, self.pages_a_slot
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers and heads."""
        return int(self.data[0].nbytes)

    @property
    def memory_bytes(self) -> int:
        """Bytes when every slot is full."""
        return int(self.data.nbytes)

    def keys(self, slot: int, layer: int, head: int, stop: int) -> Floats:
        """Keys of positions 0 to ``stop``: float32 (stop, head_dim), a copy."""
        pages = self.data[self.page_numbers[slot], layer, head, 0]
        by_page = pages.reshape(self.pages_a_slot, -1, PAGE_TOKENS).transpose(0, 2, 1)
        by_position: Floats = by_page.reshape(self.pages_a_slot * PAGE_TOKENS, -1)
        return by_position[:stop].copy()

    def values(self, slot: int, layer: int, head: int, stop: int) -> Floats:
        """Values of positions 0 to ``stop``: float32 (stop, head_dim), a copy."""
        pages = self.data[self.page_numbers[slot], layer, head, 1]
        by_position: Floats = pages.reshape(self.pages_a_slot * PAGE_TOKENS, -1)
        return by_position[:stop].copy()
