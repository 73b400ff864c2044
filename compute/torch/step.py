"""One step's rows as tensors: what all layers of a rank ask of them, worked out once.

Shape letters: N new positions of all rows, L of one row, S positions that a row sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compute.stage import Row
from compute.torch.linear import Blocks
from models.rope import inverse_frequencies
from models.spec import RopeSpec

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """One row: ``flat`` of all new positions are the ``start`` to ``stop`` of a slot."""

    slot: int
    start: int
    stop: int
    flat: slice

    def first(self, window: int | None) -> int:
        """The first position that any of them sees."""
        return 0 if window is None else max(0, self.start - window + 1)


class Step:
    """The rows in the order in which they run: those of one token before all others.

    Attributes:
        spans: where each row lies.
        ids_N, positions_N: int64, of every new position.
        blocks: rows of a multiplication.
        order: places that the new positions have among the caller's; None where the same.
        ends: int64, places of the last positions of the rows that want logits, as the caller
            ordered them.
    """

    def __init__(self, rows: Sequence[Row], *, device: torch.device, padded: bool) -> None:
        running = sorted(range(len(rows)), key=lambda number: len(rows[number].ids) > 1)
        begins = np.cumsum([0, *(len(row.ids) for row in rows)])
        spans: dict[int, Span] = {}
        at = 0
        for number in running:
            row = rows[number]
            stop = at + len(row.ids)
            spans[number] = Span(row.slot, row.start, row.start + len(row.ids), slice(at, stop))
            at = stop
        ids = [token for number in running for token in rows[number].ids]
        positions = np.concatenate([np.arange(s.start, s.stop) for s in spans.values()])
        order: Longs = np.concatenate(
            [np.arange(begins[number], begins[number + 1]) for number in running]
        )
        ends = [spans[n].flat.stop - 1 for n, row in enumerate(rows) if row.want_logits]
        self.device = device
        self.spans = tuple(spans.values())
        self.ids_N = torch.tensor(ids, dtype=torch.int64, device=device)
        self.positions_N = torch.from_numpy(positions.astype(np.int64)).to(device)
        self.order = None if np.array_equal(order, np.arange(len(order))) else order
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        num_single = sum(_length(span) == 1 for span in self.spans)
        self.padded = padded
        self.blocks = Blocks.of(num_single, len(ids)) if padded else Blocks()
        self._turns: dict[RopeSpec, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def alone(self, num_rows: int) -> Blocks:
        """Blocks of rows gathered from anywhere in the step."""
        return Blocks.of(num_rows, num_rows) if self.padded else Blocks()

    def turns(self, rope: RopeSpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every new position: float32 (N, 1, half of the features)."""
        if rope not in self._turns:
            frequencies, factor = inverse_frequencies(rope)
            turning = torch.from_numpy(frequencies).to(self.device)
            angles = self.positions_N.float()[:, None, None] * turning
            self._turns[rope] = (angles.cos() * factor, angles.sin() * factor)
        return self._turns[rope]

    def mask(self, span: Span, window: int | None) -> Tensor | None:
        """Which positions from ``span.first(window)`` on each sees: bool (L, S); None for all."""
        if _length(span) == 1:
            return None
        key = (span.slot, window)
        if key not in self._masks:
            query_L1 = torch.arange(span.start, span.stop, device=self.device)[:, None]
            key_S = torch.arange(span.first(window), span.stop, device=self.device)
            mask_LS = key_S <= query_L1
            if window is not None:
                mask_LS &= key_S > query_L1 - window
            self._masks[key] = mask_LS
        return self._masks[key]


def _length(span: Span) -> int:
    return span.stop - span.start
