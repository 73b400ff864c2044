"""Turns stored weights into the kernels' layout, bit for bit the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compute.cpu import layout
from compute.cpu.layout import GROUP, TILE, padded
from compute.cpu.stored import TAKE_APART
from compute.errors import OutOfMemory
from models.checkpoint import Weight
from models.quant import KINDS

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
ALL = slice(None)
SLAB_BYTES = 32 << 20


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


def pack(
    weight: Weight, rows: slice = ALL, columns: slice = ALL, *, arena: Arena | None = None
) -> Packed:
    """Pack a part of a matrix.

    Args:
        weight: a matrix of any kind that ``models`` reads.
        rows: outputs to keep.
        columns: inputs to keep. A quantised weight stays quantised if both ends are multiples of
            32; else it becomes float32, which takes more memory and holds the same numbers.
        arena: where to lay it; one of its own by default.
    """
    arena = arena or Arena()
    num_rows, num_columns = len(range(*rows.indices(weight.shape[0]))), weight.shape[1]
    start, stop, _ = columns.indices(num_columns)
    if weight.kind in TAKE_APART and start % GROUP == 0 and stop % GROUP == 0:
        return _pack_quantised(arena, weight, rows, start, stop)
    kind, values = _dense(weight, rows, columns)
    wide = np.zeros((padded(num_rows), padded(stop - start)), dtype=values.dtype)
    wide[:num_rows, : stop - start] = values
    data = _empty(arena, kind, wide.shape[0] // TILE, wide.shape[1] // GROUP)
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


class Arena:
    """Room for matrices in slabs large enough for the system's huge pages.

    A step reads every weight once; with 4 KiB pages it would spend its time looking up addresses.
    """

    def __init__(self) -> None:
        self._slab = np.empty(0, dtype=np.uint8)
        self._used = 0

    def take(self, size: int) -> Bytes:
        """Uninitialised uint8 (size,) on a 64-byte boundary; lives as long as it is used.

        Raises OutOfMemory.
        """
        if self._used + size > self._slab.size:
            try:
                self._slab = np.empty(max(SLAB_BYTES, size + 64), dtype=np.uint8)
            except MemoryError as exc:
                raise OutOfMemory("weights", size) from exc
            self._used = -self._slab.ctypes.data % 64
        start = self._used
        self._used += -(-size // 64) * 64
        return self._slab[start : start + size]


def _empty(arena: Arena, kind: int, tiles: int, groups: int) -> Bytes:
    block_bytes = layout.BLOCK_BYTES[kind]
    return arena.take(tiles * groups * block_bytes).reshape(tiles, groups, block_bytes)


def _tiled(stored: Array) -> Array:
    """``(rows, groups, n)`` to ``(tiles, 32, groups, n)``; rows are padded with zeros."""
    missing = -stored.shape[0] % TILE
    if missing:
        stored = np.concatenate([stored, np.zeros((missing, *stored.shape[1:]), stored.dtype)])
    return stored.reshape(-1, TILE, *stored.shape[1:])


def _pack_quantised(arena: Arena, weight: Weight, rows: slice, start: int, stop: int) -> Packed:
    block = KINDS[weight.kind]
    packed = weight.packed(rows)
    stored = packed.reshape(packed.shape[0], -1, block.block_bytes)
    first, last = start // block.block_size, -(-stop // block.block_size)
    parts = TAKE_APART[weight.kind](stored[:, first:last])
    groups = slice(
        (start - first * block.block_size) // GROUP, (stop - first * block.block_size) // GROUP
    )
    tiled = _tiled(parts.numbers[:, groups])
    tiles, _, num_groups, size = tiled.shape
    data = _empty(arena, parts.kind, tiles, num_groups)
    at = size * TILE
    data[..., :at].reshape(tiles, num_groups, size, TILE)[...] = tiled.transpose(0, 2, 3, 1)
    for factor in parts.factors:
        tiled = _tiled(factor[:, groups, None])[..., 0]
        size = factor.dtype.itemsize * TILE
        by_group = np.ascontiguousarray(tiled.transpose(0, 2, 1))
        data[..., at : at + size] = by_group.view(np.uint8)
        at += size
    return Packed(parts.kind, data, packed.shape[0], stop - start)
