"""Turns stored weights into the kernels' layout, bit for bit the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compute.cpu import layout
from compute.cpu.layout import GROUP, TILE, padded
from compute.cpu.stored import LAYOUTS, TAKE_APART
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
    """Pack a part of a matrix, some rows at a time, and give the file's pages back.

    Args:
        weight: a matrix of any kind that ``models`` reads.
        rows: outputs to keep.
        columns: inputs to keep. A quantised weight stays quantised if both ends are multiples of
            32; else it becomes float32, which takes more memory and holds the same numbers.
        arena: where to lay it; one of its own by default.

    Raises:
        OutOfMemory: no room.
    """
    arena = arena or Arena()
    first, last, _ = rows.indices(weight.shape[0])
    start, stop, _ = columns.indices(weight.shape[1])
    kind = kind_of(weight.kind, start, stop)
    fill = _fill_dense if kind in (layout.F32, layout.F16, layout.BF16) else _fill_quantised
    num_rows = max(0, last - first)
    tiles, groups = padded(num_rows) // TILE, padded(stop - start) // GROUP
    data = _empty(arena, kind, tiles, groups)
    for some in weight.chunks(slice(first, last), multiple=TILE):
        at, end = (some.start - first) // TILE, -(-(some.stop - first) // TILE)
        fill(data[at:end], weight, some, slice(start, stop))
    return Packed(kind, data, num_rows, stop - start)


def kind_of(stored: str, start: int, stop: int) -> int:
    """The ``layout`` kind of inputs ``start`` to ``stop`` of a weight in a storage format."""
    if stored in TAKE_APART and start % GROUP == 0 and stop % GROUP == 0:
        return LAYOUTS[stored]
    return {"BF16": layout.BF16, "F16": layout.F16}.get(stored, layout.F32)


def vector(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A bias or norm weight, padded with zeros to whole groups."""
    out = np.zeros(padded(values.shape[0]), dtype=np.float32)
    out[: values.shape[0]] = values
    return out


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


def _fill_dense(data: Bytes, weight: Weight, rows: slice, columns: slice) -> None:
    """Pack rows of a weight of plain numbers, or of one that is taken as such, into tiles."""
    values: Array
    if weight.kind in ("BF16", "F16"):
        values = weight.packed(rows, columns).view(np.uint16)
    else:
        values = weight.dequantize(rows, columns)
    num_rows, num_columns = values.shape
    view = data.view(values.dtype).reshape(*data.shape[:2], GROUP, TILE)
    if num_rows % TILE or num_columns % GROUP:
        wide = np.zeros((len(data) * TILE, data.shape[1] * GROUP), dtype=values.dtype)
        wide[:num_rows, :num_columns] = values
        values = wide
    tiled = values.reshape(len(data), TILE, data.shape[1], GROUP)
    view[...] = tiled.transpose(0, 2, 3, 1)


def _fill_quantised(data: Bytes, weight: Weight, rows: slice, columns: slice) -> None:
    """Pack rows of blocks into tiles; the columns are whole groups."""
    block = KINDS[weight.kind]
    size, start = block.block_size, int(columns.start)
    first, last = start // size * size, min(-(-int(columns.stop) // size) * size, weight.shape[1])
    stored = weight.packed(rows, slice(first, last))
    parts = TAKE_APART[weight.kind](stored.reshape(len(stored), -1, block.block_bytes))
    groups = slice((start - first) // GROUP, (int(columns.stop) - first) // GROUP)
    tiled = _tiled(parts.numbers[:, groups])
    tiles, _, num_groups, size = tiled.shape
    at = size * TILE
    data[..., :at].reshape(tiles, num_groups, size, TILE)[...] = tiled.transpose(0, 2, 3, 1)
    for factor in parts.factors:
        tiled = _tiled(factor[:, groups, None])[..., 0]
        size = factor.dtype.itemsize * TILE
        by_group = np.ascontiguousarray(tiled.transpose(0, 2, 1))
        data[..., at : at + size] = by_group.view(np.uint8)
        at += size
