"""Linears that Hugging Face checkpoints quantise: fp8 blocks, AWQ and GPTQ, read part by part.

Their values are exact: a whole number or fp8 value times a scale has few enough bits for float32
(fp8 with a float32 scale is rounded once, as the format's own reference does it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.quant import Bytes, Floats, to_float32
from models.weights import ALL, Weight, bounds, pieces, release

Array = npt.NDArray[Any]
Longs = npt.NDArray[np.int64]
WORD_BITS = 32
# nibble of a 32-bit word that holds each of its eight outputs
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScaledWeight(Weight):
    """fp8 values with a float scale for each block of outputs and inputs.

    Attributes:
        scales: float32 (blocks of rows, blocks of columns), in file order.
        block: rows and columns of a block; the last ones may be short.

    Source: DeepSeek-V3 ``inference/kernel.py``, ``weight_dequant``.
    """

    scales: Floats
    block: tuple[int, int]

    @property
    def block_columns(self) -> int:
        """Columns that share a scale."""
        return self.block[1]

    def rows(self, rows: slice) -> ScaledWeight:
        """The same tensor, narrowed to ``rows``."""
        return replace(self, shape=_narrowed(self, rows), row_order=_indices(self, rows))

    def dequantize(self, rows: slice = ALL, columns: slice = ALL) -> Floats:
        """Values of ``rows`` x ``columns`` (step 1) as float32, a fresh array."""
        start, stop = bounds(columns, self.num_columns)
        values = to_float32(self.packed(rows, slice(start, stop)), self.kind)
        scales = self.scales[_indices(self, rows) // self.block[0]]
        size = self.block[1]
        for column in range(start // size, -(-stop // size)):
            part = slice(max(column * size, start) - start, (column + 1) * size - start)
            values[:, part] *= scales[:, column, None]
        return values


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GroupedWeight(Weight):
    """Whole numbers with a scale and a zero point for each output and group of inputs.

    The file has inputs first: ``data`` are the bytes of its ``qweight``, and ``kind`` is AWQ or
    GPTQ. A value is ``(number - zero) * scale``.

    Attributes:
        words: int32 numbers; AWQ (inputs, outputs / 8), GPTQ (inputs / n, outputs) where a word
            holds n.
        zeros: int32 (groups, outputs / n).
        scales: float (groups, outputs), half or single.
        bits: of a number.
        group_size: inputs of a group.
        group_of: int32 (inputs,): group of each input, where they are not in order.
        zero_offset: added to stored zero points, modulo their range.

    Source: AutoAWQ ``awq/utils/packing_utils.py``; AutoGPTQ ``qlinear_cuda_old.py`` and
        GPTQ-for-LLaMa ``quant.py`` (zero points are kept less one, and wrap).
    """

    words: Array
    zeros: Array
    scales: Array
    bits: int
    group_size: int
    group_of: Array | None = None
    zero_offset: int = 0

    @property
    def block_columns(self) -> int:
        """Inputs that share a scale, or words where groups are not in order."""
        return self.group_size if self.group_of is None else WORD_BITS // self.bits

    @property
    def size_bytes(self) -> int:
        """Bytes of numbers, zero points, scales and groups."""
        extra = 0 if self.group_of is None else self.group_of.nbytes
        return int(self.words.nbytes + self.zeros.nbytes + self.scales.nbytes + extra)

    def packed(self, rows: slice = ALL, columns: slice = ALL) -> Bytes:
        """Always refused: a row's numbers do not lie together. Raises ValueError."""
        raise ValueError(f"{self.name}: {self.kind} has no blocks by rows; dequantize it")

    def rows(self, rows: slice) -> GroupedWeight:
        """The same tensor, narrowed to ``rows``."""
        return replace(self, shape=_narrowed(self, rows), row_order=_indices(self, rows))

    def dequantize(self, rows: slice = ALL, columns: slice = ALL) -> Floats:
        """Values of ``rows`` x ``columns`` (step 1) as float32, a fresh array."""
        outputs = _indices(self, rows)
        start, stop = bounds(columns, self.num_columns)
        if not len(outputs) or start == stop:
            return np.zeros((len(outputs), stop - start), dtype=np.float32)
        if self.group_of is None:
            groups = np.arange(start, stop) // self.group_size
        else:
            groups = self.group_of[start:stop].astype(np.int64)
        first, last = int(groups.min()), int(groups.max()) + 1
        mask = (1 << self.bits) - 1
        zeros = (self._outputs(self.zeros[first:last], outputs) + self.zero_offset) & mask
        scales = self.scales[first:last, _span(outputs)][:, outputs - outputs.min()]
        if self.kind == "AWQ":
            numbers = self._outputs(self.words[start:stop], outputs)
        else:
            numbers = self._inputs(start, stop, outputs)
        values = np.empty((len(outputs), stop - start), dtype=np.float32)
        values[...] = numbers.T
        values -= zeros[groups - first].T
        values *= scales[groups - first].T
        return values

    def chunks(self, rows: slice = ALL, *, multiple: int = 1) -> Iterator[slice]:
        """See :meth:`Weight.chunks`. A row lies all over the file: pages go at the end."""
        yield from pieces(self, rows, multiple)
        self.release()

    def release(self) -> None:
        """See :meth:`Weight.release`."""
        for array in (self.words, self.zeros, self.scales):
            release(array.view(np.uint8) if array.flags.c_contiguous else self.data)

    def _outputs(self, words: Array, outputs: Longs) -> Array:
        """Numbers packed along outputs: int32 (n, words) to (n, outputs)."""
        count = WORD_BITS // self.bits
        first = int(outputs.min()) // count
        part = words[:, first : int(outputs.max()) // count + 1]
        places = AWQ_NIBBLES if self.kind == "AWQ" else tuple(range(count))
        fields = (part[:, :, None] >> _shifts(places, self.bits)) & ((1 << self.bits) - 1)
        return fields.reshape(len(part), -1)[:, outputs - first * count]

    def _inputs(self, start: int, stop: int, outputs: Longs) -> Array:
        """Numbers packed along inputs: int32 (inputs, outputs)."""
        count = WORD_BITS // self.bits
        first = start // count
        part = self.words[first : -(-stop // count), _span(outputs)]
        shifts = _shifts(tuple(range(count)), self.bits)
        fields = (part[:, None, :] >> shifts[None, :, None]) & ((1 << self.bits) - 1)
        flat = fields.reshape(-1, part.shape[1])[start - first * count : stop - first * count]
        return flat[:, outputs - outputs.min()]


def _shifts(places: tuple[int, ...], bits: int) -> npt.NDArray[np.int32]:
    return np.array(places, dtype=np.int32) * np.int32(bits)


def _span(outputs: Longs) -> slice:
    return slice(int(outputs.min()), int(outputs.max()) + 1)


def _indices(weight: Weight, rows: slice) -> Longs:
    start, stop = bounds(rows, weight.num_rows)
    if weight.row_order is None:
        return np.arange(start, stop, dtype=np.int64)
    return weight.row_order[start:stop]


def _narrowed(weight: Weight, rows: slice) -> tuple[int, ...]:
    start, stop = bounds(rows, weight.num_rows)
    return (stop - start, *weight.shape[1:])
