"""Projections: weights kept in 16 bits where they are stored so, and fixed numbers of rows.

Shape letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

SINGLE_BLOCK: Final = 16  # rows of one multiplication for tokens that come one at a time
CHUNK_BLOCK: Final = 128  # and for those that come many at a time
WIDENED: Final = 1 << 17  # weights that are made float32 at a time: 512 KiB stay in the cache


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection: weight (out, in), and a bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """How many rows a multiplication takes at a time.

    On a GPU the kernel that a library picks, and with it the order of a sum, depends on the number
    of rows. There every multiplication is made with one of two numbers of rows, the missing ones
    filled with zeros, so that what comes of a token does not depend on who else is in the step:
    tokens that come alone in blocks of ``SINGLE_BLOCK``, those of longer rows in blocks of
    ``CHUNK_BLOCK`` (reading the weights costs a GPU about as much as either).

    Attributes:
        cuts: ``(start, stop, rows)`` of each multiplication; None makes one of all rows.
    """

    cuts: tuple[tuple[int, int, int], ...] | None = None

    @classmethod
    def of(cls, num_single: int, num_rows: int) -> Blocks:
        """Blocks of some rows, of which the first ``num_single`` came alone."""
        alone = _cuts(0, num_single, SINGLE_BLOCK)
        return cls((*alone, *_cuts(num_single, num_rows, CHUNK_BLOCK)))

    def run(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``call`` of all rows, ``x`` and the result having rows first."""
        if self.cuts is None:
            return call(x)
        parts = []
        for start, stop, size in self.cuts:
            part = x[start:stop]
            if stop - start < size:
                missing = (size - (stop - start), *x.shape[1:])
                part = torch.cat([part, part.new_zeros(missing)])
            parts.append(call(part)[: stop - start])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def linear(self, x_NI: Tensor, linear: Linear) -> Tensor:
        """A projection of all rows."""
        return self.run(lambda part: multiply(part, linear), x_NI)


def _cuts(start: int, stop: int, size: int) -> list[tuple[int, int, int]]:
    return [(at, min(at + size, stop), size) for at in range(start, stop, size)]


def multiply(x_NI: Tensor, linear: Linear) -> Tensor:
    """A projection in the type of ``x_NI``, whatever type its weight is kept in."""
    weight_OI, bias = linear.weight, linear.bias
    if weight_OI.dtype == x_NI.dtype:
        return F.linear(x_NI, weight_OI, bias)
    outputs, inputs = weight_OI.shape
    out_NO = x_NI.new_empty((len(x_NI), outputs))
    step = max(1, WIDENED // inputs)
    room_OI = x_NI.new_empty((min(step, outputs), inputs))
    for start in range(0, outputs, step):
        part_OI = weight_OI[start : start + step]
        wide_OI = room_OI[: len(part_OI)].copy_(part_OI)
        out_NO[:, start : start + step] = x_NI @ wide_OI.T
    return out_NO if bias is None else out_NO + bias
