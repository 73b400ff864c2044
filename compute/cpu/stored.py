"""Takes stored blocks apart: whole numbers and float factors, nothing rounded.

Every function turns uint8 ``(rows, blocks, bytes)`` of one storage format into ``Parts``. The
value of a weight is ``scale * number + offset`` in all of them.

Source: ggml's ``dequantize_row_*``, as written in numpy in the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compute.cpu import layout

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_BITS = np.arange(32, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class Parts:
    """Numbers and factors of a matrix, by groups of 32 inputs.

    Attributes:
        kind: the ``layout`` kind that holds them.
        numbers: uint8 (rows, groups, 32), or (rows, groups, 16) where two share a byte.
        factors: float (rows, groups) each, in the order of the layout.
    """

    kind: int
    numbers: Bytes
    factors: tuple[npt.NDArray[Any], ...]


def _half(stored: Bytes, at: int) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(stored[..., at : at + 2]).view(np.float16)[..., 0]


def _wide(stored: Bytes, at: int) -> Floats:
    """A half of each block as float32 (rows, blocks, 1)."""
    return _half(stored, at).astype(np.float32)[..., None]


def _shifted(values: Bytes, lanes: int, shifts: tuple[int, ...], mask: int) -> Bytes:
    """Bit fields: of each run of ``lanes`` bytes, all lanes at the first shift, then the next."""
    rows, blocks, _ = values.shape
    runs = values.reshape(rows, blocks, -1, 1, lanes)
    fields: Bytes = (runs >> np.array(shifts, dtype=np.uint8)[:, None]) & np.uint8(mask)
    return fields.reshape(rows, blocks, -1)


def _grouped(numbers: npt.NDArray[Any], size: int = 32) -> Bytes:
    """``(rows, blocks, n)`` to bytes ``(rows, groups, size)``."""
    return np.ascontiguousarray(numbers).view(np.uint8).reshape(numbers.shape[0], -1, size)


def _flat(factor: Floats) -> Floats:
    return factor.reshape(factor.shape[0], -1)


def _by_32(kind: int, numbers: Bytes, scale: Floats, offset: Floats) -> Parts:
    scale, offset = _flat(scale), _flat(offset)
    if kind == layout.Q8S:  # a factor for each 16
        return Parts(kind, numbers, (scale, scale, offset, offset))
    return Parts(kind, numbers, (scale, offset))


def _by_16(numbers: Bytes, scale: Floats, offset: Floats) -> Parts:
    scale, offset = _flat(scale), _flat(offset)
    factors = (scale[:, ::2], scale[:, 1::2], offset[:, ::2], offset[:, 1::2])
    return Parts(layout.Q8S, numbers, factors)


def _q4_0(stored: Bytes) -> Parts:
    scale = _wide(stored, 0)  # d * (q - 8) is d * q - 8 d, and 8 d is exact
    return _by_32(layout.Q4S, stored[..., 2:], scale, -8 * scale)


def _q4_1(stored: Bytes) -> Parts:
    return Parts(layout.Q4H, stored[..., 4:], (_half(stored, 0), _half(stored, 2)))


def _fifth_bits(stored: Bytes, at: int) -> Bytes:
    words = np.ascontiguousarray(stored[..., at : at + 4]).view(np.uint32)
    return (((words >> _BITS) & 1) << 4).astype(np.uint8)


def _q5_0(stored: Bytes) -> Parts:
    low = _shifted(stored[..., 6:], 16, (0, 4), 15)
    numbers = (low | _fifth_bits(stored, 2)).astype(np.int8) - np.int8(16)
    return Parts(layout.Q8H, _grouped(numbers), (_half(stored, 0),))


def _q5_1(stored: Bytes) -> Parts:
    numbers = _shifted(stored[..., 8:], 16, (0, 4), 15) | _fifth_bits(stored, 4)
    return _by_32(layout.Q8S, _grouped(numbers), _wide(stored, 0), _wide(stored, 2))


def _q8_0(stored: Bytes) -> Parts:
    return Parts(layout.Q8H, stored[..., 2:], (_half(stored, 0),))


def _q2_k(stored: Bytes) -> Parts:
    scales = stored[..., :16]
    numbers = _shifted(stored[..., 16:80], 32, (0, 2, 4, 6), 3)
    scale = _wide(stored, 80) * (scales & 15).astype(np.float32)
    offset = -(_wide(stored, 82) * (scales >> 4).astype(np.float32))
    return _by_16(_grouped(numbers), scale, offset)


def _q3_k(stored: Bytes) -> Parts:
    high = _shifted(stored[..., :32], 32, tuple(range(8)), 1)
    low = _shifted(stored[..., 32:96], 32, (0, 2, 4, 6), 3)
    numbers = low.astype(np.int8) - ((high ^ 1) << 2).astype(np.int8)
    low_scales = _shifted(stored[..., 96:104], 8, (0, 4), 15)
    high_scales = _shifted(stored[..., 104:108], 4, (0, 2, 4, 6), 3)
    scales = (low_scales | (high_scales << 4)).astype(np.int8) - np.int8(32)
    scale = _wide(stored, 108) * scales.astype(np.float32)
    return _by_16(_grouped(numbers), scale, np.zeros_like(scale))


def _k_scales(stored: Bytes) -> tuple[Floats, Floats]:
    """Scales and offsets of the 8 groups of a Q4_K or Q5_K block: float32 (rows, blocks, 8)."""
    d, m, both = stored[..., 4:8], stored[..., 8:12], stored[..., 12:16]
    scales = np.concatenate([d & 63, (both & 15) | ((d >> 2) & 48)], axis=-1)
    mins = np.concatenate([m & 63, (both >> 4) | ((m >> 2) & 48)], axis=-1)
    scale = _wide(stored, 0) * scales.astype(np.float32)
    return scale, -(_wide(stored, 2) * mins.astype(np.float32))


def _q4_k(stored: Bytes) -> Parts:
    numbers = _shifted(stored[..., 16:], 32, (0, 4), 15)
    halves = numbers.reshape(*numbers.shape[:2], 8, 2, 16)
    paired = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return _by_32(layout.Q4S, _grouped(paired, 16), *_k_scales(stored))


def _q5_k(stored: Bytes) -> Parts:
    high = _shifted(stored[..., 16:48], 32, tuple(range(8)), 1)
    numbers = _shifted(stored[..., 48:], 32, (0, 4), 15) | (high << 4)
    return _by_32(layout.Q8S, _grouped(numbers), *_k_scales(stored))


def _q6_k(stored: Bytes) -> Parts:
    low = _shifted(stored[..., :128], 64, (0, 4), 15)
    high = _shifted(stored[..., 128:192], 32, (0, 2, 4, 6), 3)
    numbers = (low | (high << 4)).astype(np.int8) - np.int8(32)
    scales = stored[..., 192:208].view(np.int8).astype(np.float32)
    scale = _wide(stored, 208) * scales
    return _by_16(_grouped(numbers), scale, np.zeros_like(scale))


TAKE_APART: dict[str, Callable[[Bytes], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
LAYOUTS: dict[str, int] = {
    **dict.fromkeys(("Q4_0", "Q4_K"), layout.Q4S),
    "Q4_1": layout.Q4H,
    **dict.fromkeys(("Q5_0", "Q8_0"), layout.Q8H),
    **dict.fromkeys(("Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K"), layout.Q8S),
}
