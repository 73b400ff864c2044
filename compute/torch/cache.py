"""Keys and values of every page, or latent vectors in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compute.page_table import PAGE_TOKENS, PageTable
from compute.stage import Row
from compute.torch.step import Span, Step
from models.footprint import most_sequences
from models.sharding import RankShard
from models.spec import ModelSpec


class Cache:
    """What a rank remembers of each position; memory is touched as positions are filled.

    Attributes:
        keys, values: (layers, kv heads, positions of all pages, head_dim); for latent attention
            there is one head, whose keys are the normed latent vector and behind it the rotated
            part, and whose values are the first features of the keys.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: RankShard,
        *,
        context_tokens: int,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        latent = spec.latent
        heads = len(shard.kv_heads) if latent is None else 1
        size = spec.head_dim if latent is None else latent.kv_rank + latent.rope_dim
        pages_a_slot = -(-context_tokens // PAGE_TOKENS)
        self.num_sequences, self.num_pages = most_sequences(num_slots), num_slots * pages_a_slot
        shape = (len(shard.layers), heads, self.num_pages * PAGE_TOKENS, size)
        self.keys = _zeros(shape, device, dtype)
        if latent is None:
            self.values = _zeros(shape, device, dtype)
        else:
            self.values = self.keys[..., : latent.kv_rank]
        self.memory_bytes = self.keys.nbytes + (0 if latent else self.values.nbytes)
        self._device = device
        self._table = PageTable(
            pages_a_slot=pages_a_slot, num_slots=self.num_sequences, num_pages=self.num_pages
        )
        self._places_N = torch.empty(0, dtype=torch.int64)
        self._seen: dict[tuple[int, int], slice | Tensor] = {}

    def begin(self, rows: Sequence[Row], step: Step) -> None:
        """Find out where the new positions of a step go."""
        self._table.follow(rows)
        places = [self._table.places(s.slot, s.start, s.stop) for s in step.spans]
        self._places_N = torch.from_numpy(np.concatenate(places)).to(self._device)
        self._seen.clear()

    def put(self, layer: int, keys: Tensor, values: Tensor | None = None) -> None:
        """Remember the new positions of a layer (counted within the rank): (N, heads, size)."""
        for whole, new in ((self.keys, keys), (self.values, values)):
            if new is not None:
                whole[layer].index_copy_(1, self._places_N, new.transpose(0, 1).to(whole.dtype))

    def seen(self, layer: int, span: Span, window: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions that a row sees, from ``span.first(window)`` on:
        (heads, S, size) each; views where their pages lie side by side, else copies."""
        first = span.first(window)
        where = self._seen.get((span.slot, first))
        if where is None:
            runs = self._table.runs(span.slot, first, span.stop)
            if len(runs) == 1:
                where = runs[0]
            else:
                places = self._table.places(span.slot, first, span.stop)
                where = torch.from_numpy(places).to(self._device)
            self._seen[span.slot, first] = where
        return self.keys[layer][:, where], self.values[layer][:, where]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # numpy asks the system for zeroed memory, which costs nothing until it is written
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
