"""Stored blocks as MLX's affine quantisation holds them: ``scale * number + offset``.

Both factors belong to 32 inputs; nothing is rounded in float32. Formats whose scales change every
16 inputs (Q2_K, Q3_K, Q6_K) do not fit, since MLX's smallest group is 32.

Source: MLX ``mx.quantize``: a row's numbers lie in uint32 words as one little-endian bit stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from compute.cpu import layout
from compute.cpu.layout import GROUP
from compute.cpu.stored import TAKE_APART, Parts
from models.checkpoint import Weight
from models.quant import KINDS

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

BITS: Final = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}


@dataclass(frozen=True, slots=True)
class Affine:
    """Part of a matrix.

    Attributes:
        words: uint32 (rows, groups * bits), the numbers.
        scales, offsets: float32 (rows, groups).
    """

    words: Words
    scales: Floats
    offsets: Floats


def can_pack(weight: Weight, columns: slice) -> bool:
    """Whether a format fits, and a column cut leaves its groups intact."""
    start, stop, _ = columns.indices(weight.num_columns)
    return weight.kind in BITS and start % GROUP == 0 and stop % GROUP == 0


def affine(weight: Weight, rows: slice, columns: slice) -> Affine:
    """Take a part of a matrix apart; see ``can_pack``."""
    block = KINDS[weight.kind]
    start, stop, _ = columns.indices(weight.num_columns)
    first, last = start // block.block_size, -(-stop // block.block_size)
    wide = slice(first * block.block_size, min(last * block.block_size, weight.num_columns))
    packed = weight.packed(rows, wide)
    stored = packed.reshape(packed.shape[0], -1, block.block_bytes)
    parts = TAKE_APART[weight.kind](stored)
    before = first * block.block_size
    groups = slice((start - before) // GROUP, (stop - before) // GROUP)
    bits = BITS[weight.kind]
    scales = _floats(parts.factors[0][:, groups])
    if parts.kind == layout.Q8H:  # signed numbers and no offset
        zero = 1 << (bits - 1)
        numbers = (parts.numbers[:, groups].view(np.int8).astype(np.int16) + zero).astype(np.uint8)
        return Affine(pack_bits(numbers, bits), scales, scales * np.float32(-zero))
    offsets = _floats(_offsets(parts)[:, groups])
    return Affine(pack_bits(_numbers(parts)[:, groups], bits), scales, offsets)


def pack_bits(numbers: Bytes, bits: int) -> Words:
    """Numbers below ``2 ** bits``, uint8 (rows, groups, 32), as words: (rows, groups * bits)."""
    rows, groups, _ = numbers.shape
    eights = numbers.reshape(rows, groups * 4, 8)
    if bits == 8:
        stream = np.ascontiguousarray(eights)
    elif bits == 4:
        stream = eights[..., ::2] | (eights[..., 1::2] << np.uint8(4))
    else:
        joined = np.zeros(eights.shape[:2], dtype="<u8")
        for place in range(8):
            joined |= eights[..., place].astype(np.uint64) << np.uint64(place * bits)
        stream = joined.view(np.uint8).reshape(rows, -1, 8)[..., :bits]
    return np.ascontiguousarray(stream).reshape(rows, -1).view("<u4").astype(np.uint32, copy=False)


def _numbers(parts: Parts) -> Bytes:
    """uint8 (rows, groups, 32): halves that share a byte side by side."""
    if parts.kind not in (layout.Q4H, layout.Q4S):
        return parts.numbers
    return np.concatenate([parts.numbers & 15, parts.numbers >> 4], axis=-1)


def _offsets(parts: Parts) -> npt.NDArray[np.floating]:
    return parts.factors[2 if parts.kind == layout.Q8S else 1]


def _floats(factors: npt.NDArray[np.floating]) -> Floats:
    return np.ascontiguousarray(factors, dtype=np.float32)
