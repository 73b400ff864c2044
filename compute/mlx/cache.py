"""Keys and values of every page and layer.

Shape letters: K key/value heads, N new positions of all rows, S positions seen, E features.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from compute.page_table import PAGE_TOKENS, PageTable
from compute.stage import Row
from models.footprint import most_sequences


class Cache:
    """What one rank remembers of each position.

    Attributes:
        widths: features of each array of a layer: a key's and a value's, or a latent vector's.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        widths: tuple[int, ...],
        context_tokens: int,
        num_slots: int,
        dtype: mx.Dtype,
    ) -> None:
        self.widths = widths
        pages_a_slot = -(-context_tokens // PAGE_TOKENS)
        self.num_sequences, self.num_pages = most_sequences(num_slots), num_slots * pages_a_slot
        self._dtype = dtype
        positions = self.num_pages * PAGE_TOKENS
        self._arrays = [
            [mx.zeros((1, num_heads, positions, width), dtype) for width in widths]
            for _ in range(num_layers)
        ]
        mx.eval(self._arrays)
        self.full_bytes = num_layers * num_heads * positions * sum(widths) * dtype.size
        self._table = PageTable(
            pages_a_slot=pages_a_slot, num_slots=self.num_sequences, num_pages=self.num_pages
        )
        self._new: list[tuple[slice, slice]] = []
        self._seen: dict[tuple[int, int], list[slice]] = {}

    def begin(self, rows: Sequence[Row]) -> None:
        """Find out where the new positions of a step go."""
        self._table.follow(rows)
        self._new, at = [], 0
        self._seen = {}
        for row in rows:
            for run in self._table.runs(row.slot, row.start, row.start + len(row.ids)):
                stop = at + run.stop - run.start
                self._new.append((run, slice(at, stop)))
                at = stop

    def put(self, layer: int, new: tuple[mx.array, ...]) -> None:
        """Remember the new positions of all rows, before any is read.

        Args:
            layer: counted within the rank.
            new: (1, K, N, E) for each of ``widths``.
        """
        for array, values in zip(self._arrays[layer], new, strict=True):
            values = values.astype(self._dtype)
            for run, part in self._new:
                array[:, :, run] = values[:, :, part]

    def seen(self, layer: int, row: Row, first: int) -> list[mx.array]:
        """Everything of a row from position ``first`` to its last new one.

        Returns:
            For each of ``widths`` (1, K, S, E).
        """
        if (row.slot, first) not in self._seen:
            stop = row.start + len(row.ids)
            self._seen[row.slot, first] = self._table.runs(row.slot, first, stop)
        runs = self._seen[row.slot, first]
        return [_joined([array[:, :, run] for run in runs]) for array in self._arrays[layer]]

    def arrays(self) -> list[mx.array]:
        """All arrays, to evaluate them with a step."""
        return [array for layer in self._arrays for array in layer]


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
