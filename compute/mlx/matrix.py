"""Weight matrices on the device: packed in MLX's affine form where that is exact, else whole.

Shape letters: N positions, I inputs, O outputs, X experts, A experts that a position uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from compute.cpu.layout import GROUP
from compute.mlx.pack import BITS, Affine, affine, can_pack
from models.checkpoint import Weight


class Matrix(Protocol):
    """One matrix (O, I), or the same one of several experts (X, O, I)."""

    @property
    def num_bytes(self) -> int:
        """As it lies in memory."""
        ...

    def multiply(self, x_NI: mx.array) -> mx.array:
        """Outputs (N, O)."""
        ...

    def rows(self, ids_N: mx.array) -> mx.array:
        """Some of its rows, (N, I)."""
        ...

    def between(self, start: int, stop: int) -> Matrix:
        """A view of the outputs from ``start`` to ``stop``."""
        ...

    def by_expert(self, x_NAI: mx.array, experts_NA: mx.array) -> mx.array:
        """Outputs of the named experts, (N, A, O); A of ``x`` may be 1."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A matrix in one type of float."""

    weight: mx.array

    @property
    def num_bytes(self) -> int:
        """See :class:`Matrix`."""
        return int(self.weight.nbytes)

    def multiply(self, x_NI: mx.array) -> mx.array:
        """See :class:`Matrix`."""
        return x_NI @ self.weight.T

    def rows(self, ids_N: mx.array) -> mx.array:
        """See :class:`Matrix`."""
        return self.weight[ids_N]

    def between(self, start: int, stop: int) -> Dense:
        """See :class:`Matrix`."""
        return Dense(self.weight[start:stop])

    def by_expert(self, x_NAI: mx.array, experts_NA: mx.array) -> mx.array:
        """See :class:`Matrix`."""
        by_input = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x_NAI[:, :, None], by_input, rhs_indices=experts_NA)[:, :, 0]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Numbers of a few bits with a scale and an offset for each 32 inputs.

    Attributes:
        words: uint32 (..., O, I * bits / 32).
        scales, offsets: of the activations' type, (..., O, I / 32).
        bits: of a number.
    """

    words: mx.array
    scales: mx.array
    offsets: mx.array
    bits: int

    @property
    def num_bytes(self) -> int:
        """See :class:`Matrix`."""
        return int(self.words.nbytes + self.scales.nbytes + self.offsets.nbytes)

    def multiply(self, x_NI: mx.array) -> mx.array:
        """See :class:`Matrix`."""
        return mx.quantized_matmul(
            x_NI,
            self.words,
            self.scales,
            self.offsets,
            transpose=True,
            group_size=GROUP,
            bits=self.bits,
        )

    def rows(self, ids_N: mx.array) -> mx.array:
        """See :class:`Matrix`."""
        return mx.dequantize(
            self.words[ids_N],
            self.scales[ids_N],
            self.offsets[ids_N],
            group_size=GROUP,
            bits=self.bits,
        )

    def between(self, start: int, stop: int) -> Packed:
        """See :class:`Matrix`."""
        part = slice(start, stop)
        return Packed(self.words[part], self.scales[part], self.offsets[part], self.bits)

    def by_expert(self, x_NAI: mx.array, experts_NA: mx.array) -> mx.array:
        """See :class:`Matrix`."""
        return mx.gather_qmm(
            x_NAI[:, :, None],
            self.words,
            self.scales,
            self.offsets,
            rhs_indices=experts_NA,
            transpose=True,
            group_size=GROUP,
            bits=self.bits,
        )[:, :, 0]


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A projection: a matrix and a bias (O,) or None."""

    matrix: Matrix
    bias: mx.array | None = None

    def __call__(self, x_NI: mx.array) -> mx.array:
        """Outputs (N, O)."""
        out = self.matrix.multiply(x_NI)
        return out if self.bias is None else out + self.bias


def load_matrix(weight: Weight, rows: slice, columns: slice, dtype: mx.Dtype) -> Matrix:
    """A part of a stored matrix, evaluated."""
    return _load([weight], rows, columns, dtype, ())


def load_stack(weights: Sequence[Weight], rows: slice, columns: slice, dtype: mx.Dtype) -> Matrix:
    """The same part of every expert's matrix, (X, O, I), evaluated."""
    return _load(weights, rows, columns, dtype, (len(weights),))


def _load(
    weights: Sequence[Weight],
    rows: slice,
    columns: slice,
    dtype: mx.Dtype,
    stack: tuple[int, ...],
) -> Matrix:
    start, stop, _ = rows.indices(weights[0].num_rows)
    left, right, _ = columns.indices(weights[0].num_columns)
    tall, wide = (stop - start) * len(weights), right - left

    def pieces() -> Iterator[tuple[int, Weight, slice]]:
        """Where each piece goes, and what it is."""
        at = 0
        for weight in weights:
            for part in weight.chunks(slice(start, stop)):
                yield at, weight, part
                at += part.stop - part.start

    def shaped(array: mx.array) -> mx.array:
        if stack:
            array = array.reshape(*stack, stop - start, array.shape[-1])
        mx.eval(array)
        return array

    kinds = {weight.kind for weight in weights}
    if len(kinds) == 1 and all(can_pack(weight, columns) for weight in weights):
        bits = BITS[kinds.pop()]
        words = mx.zeros((tall, wide // GROUP * bits), mx.uint32)
        scales, offsets = (mx.zeros((tall, wide // GROUP), dtype) for _ in range(2))
        fits = True
        for at, weight, part in pieces():
            found = affine(weight, part, columns)
            fits = fits and _fits(found, dtype)
            to = slice(at, at + len(found.words))
            words[to] = mx.array(found.words)
            scales[to] = mx.array(found.scales).astype(dtype)
            offsets[to] = mx.array(found.offsets).astype(dtype)
            mx.eval(words, scales, offsets)
        if fits:
            return Packed(shaped(words), shaped(scales), shaped(offsets), bits)
    whole = mx.zeros((tall, wide), dtype)
    for at, weight, part in pieces():
        values = mx.array(weight.dequantize(part, slice(left, right)))
        whole[at : at + values.shape[0]] = values.astype(dtype)
        mx.eval(whole)
    return Dense(shaped(whole))


def _fits(found: Affine, dtype: mx.Dtype) -> bool:
    """Whether scales and offsets stay finite in a narrower type."""
    if dtype != mx.float16:
        return True
    most = float(np.finfo(np.float16).max)
    factors = (found.scales, found.offsets)
    return all(not factor.size or float(np.abs(factor).max()) <= most for factor in factors)
