"""Turns stored weights into the kernels' layout, bit for bit the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compute.cpu import layout
from compute.cpu.layout import GROUP, TILE, padded
from models.checkpoint import Weight

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
ALL = slice(None)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One matrix in the kernels' layout.

    Attributes:
        kind: what a block holds, see ``layout``.
        data: uint8 (tiles, groups, bytes of a block), on a 64-byte boundary.
        rows, columns: outputs and inputs without padding.
    """

    kind: int
    data: Bytes
    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Tiles of 32 outputs, the last perhaps padded."""
        return int(self.data.shape[0])

    @property
    def groups(self) -> int:
        """Groups of 32 inputs, the last perhaps padded."""
        return int(self.data.shape[1])

    @property
    def address(self) -> int:
        """Where the first block lies."""
        return self.data.ctypes.data


def pack(weight: Weight, rows: slice = ALL, columns: slice = ALL) -> Packed:
    """Pack a part of a matrix.

    Args:
        weight: a matrix of any kind that ``models`` reads.
        rows: outputs to keep.
        columns: inputs to keep; for a quantised weight kept so, both ends on multiples of 32.

    Kinds without a packing of their own become float32 (or half, where that is exact), which
    takes more memory and holds the same numbers.
    """
    num_rows, num_columns = len(range(*rows.indices(weight.shape[0]))), weight.shape[1]
    start, stop, _ = columns.indices(num_columns)
    aligned = start % GROUP == 0 and (stop % GROUP == 0)
    packer = _PACKERS.get(weight.kind)
    if packer is not None and aligned:
        block_bytes = weight.packed(slice(0, 1)).shape[1] * GROUP // num_columns
        stored = weight.packed(rows).reshape(num_rows, num_columns // GROUP, block_bytes)
        kind, data = packer(stored[:, start // GROUP : stop // GROUP])
        return Packed(kind, data, num_rows, stop - start)
    kind, values = _dense(weight, rows, columns)
    wide = np.zeros((padded(num_rows), padded(stop - start)), dtype=values.dtype)
    wide[:num_rows, : stop - start] = values
    data = _empty(kind, wide.shape[0] // TILE, wide.shape[1] // GROUP)
    view = data.view(values.dtype).reshape(*data.shape[:2], GROUP, TILE)
    tiled = wide.reshape(data.shape[0], TILE, data.shape[1], GROUP)
    view[...] = tiled.transpose(0, 2, 3, 1)
    return Packed(kind, data, num_rows, stop - start)


def vector(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A bias or norm weight, padded with zeros to whole groups."""
    out = np.zeros(padded(values.shape[0]), dtype=np.float32)
    out[: values.shape[0]] = values
    return out


def _dense(weight: Weight, rows: slice, columns: slice) -> tuple[int, Array]:
    if weight.kind == "BF16":
        return layout.BF16, weight.packed(rows).view(np.uint16)[:, columns]
    if weight.kind == "F16":
        return layout.F16, weight.packed(rows).view(np.uint16)[:, columns]
    return layout.F32, weight.dequantize(rows, columns)


def _empty(kind: int, tiles: int, groups: int) -> Bytes:
    size = tiles * groups * layout.BLOCK_BYTES[kind]
    room = np.empty(size + 64, dtype=np.uint8)
    skip = -room.ctypes.data % 64
    return room[skip : skip + size].reshape(tiles, groups, layout.BLOCK_BYTES[kind])


def _tiled(stored: Array) -> Array:
    """``(rows, groups, n)`` to ``(tiles, 32, groups, n)``; rows are padded with zeros."""
    missing = -stored.shape[0] % TILE
    if missing:
        stored = np.concatenate([stored, np.zeros((missing, *stored.shape[1:]), stored.dtype)])
    return stored.reshape(-1, TILE, *stored.shape[1:])


def _pack_blocks(
    kind: int, numbers: Array, factors: list[Array], number_bytes: int
) -> tuple[int, Bytes]:
    """Lay out numbers (rows, groups, n bytes) and factors (rows, groups) of one kind."""
    tiled = _tiled(numbers)
    tiles, _, groups, _ = tiled.shape
    data = _empty(kind, tiles, groups)
    data[..., :number_bytes].reshape(tiles, groups, -1, TILE)[...] = tiled.transpose(0, 2, 3, 1)
    at = number_bytes
    for factor in factors:
        size = factor.dtype.itemsize * TILE
        tiled_factor = np.ascontiguousarray(_tiled(factor[..., None])[..., 0].transpose(0, 2, 1))
        data[..., at : at + size] = tiled_factor.view(np.uint8)
        at += size
    return kind, data


def _half(stored: Bytes, at: int) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(stored[..., at : at + 2]).view(np.float16)[..., 0]


def _q4_1(stored: Bytes) -> tuple[int, Bytes]:
    factors: list[Array] = [_half(stored, 0), _half(stored, 2)]
    return _pack_blocks(layout.Q4H, stored[..., 4:], factors, layout.Q4_BYTES)


def _q4_0(stored: Bytes) -> tuple[int, Bytes]:
    """``d * (q - 8)`` is ``d * q - 8 * d``; float32 holds ``8 * d`` of any half exactly."""
    scale = _half(stored, 0).astype(np.float32)
    return _pack_blocks(layout.Q4S, stored[..., 2:], [scale, -8 * scale], layout.Q4_BYTES)


def _q8_0(stored: Bytes) -> tuple[int, Bytes]:
    return _pack_blocks(layout.Q8H, stored[..., 2:], [_half(stored, 0)], layout.Q8_BYTES)


_PACKERS: dict[str, Callable[[Bytes], tuple[int, Bytes]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
