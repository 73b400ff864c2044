"""One stored tensor: reads only the part asked for, packed as in the file or as float32."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.quant import KINDS, Bytes, Floats, to_float32

ALL = slice(None)
CHUNK_BYTES = 4 << 20  # of float32: beside what is kept, loading takes a few times this
Longs = npt.NDArray[np.int64]
AROUND_BYTES = 2 << 20  # Linux maps 64 KiB around a touched page, or a whole large folio
_LET_GO: int = getattr(mmap, "MADV_DONTNEED", 0)  # not on Windows


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A view of one tensor in a mapped file.

    A vector of n elements counts as n rows of one column, so that rows mean the same in a bias
    as in its matrix.

    Attributes:
        name: canonical name.
        shape: (out_features, in_features), or (n,).
        kind: storage format, a key of ``models.quant.KINDS``, or what a subclass reads.
        data: uint8 (rows, bytes_per_row) over the mapping; rows in file order.
        row_order: int64 (rows,): file row of each row, where the file orders them otherwise.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Bytes
    row_order: Longs | None = None

    @property
    def num_rows(self) -> int:
        """Rows (elements of a vector)."""
        return self.shape[0]

    @property
    def num_columns(self) -> int:
        """Columns (1 for a vector)."""
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def block_columns(self) -> int:
        """Columns that are stored together: a cut on their multiples leaves blocks intact."""
        return KINDS[self.kind].block_size

    @property
    def size_bytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return int(self.data.size)

    def packed(self, rows: slice = ALL, columns: slice = ALL) -> Bytes:
        """Raw blocks of ``rows`` x ``columns`` (step 1): uint8 (rows, bytes_per_row).

        A read-only view of the mapping where rows lie in order, else a copy of that part alone.

        Raises:
            ValueError: columns that begin or end inside a block.
        """
        kind = KINDS[self.kind]
        start, stop = bounds(columns, self.num_columns)
        if start % kind.block_size or (stop % kind.block_size and stop != self.num_columns):
            raise ValueError(
                f"{self.name}: columns {start}:{stop} cut blocks of {kind.block_size} ({self.kind})"
            )
        first, last = start // kind.block_size, -(-stop // kind.block_size)
        part = self.data[:, first * kind.block_bytes : last * kind.block_bytes]
        return part[self.file_rows(rows)]

    def rows(self, rows: slice) -> Weight:
        """The same tensor, narrowed to ``rows``."""
        start, stop = bounds(rows, self.num_rows)
        shape = (stop - start, *self.shape[1:])
        if self.row_order is None:
            return replace(self, shape=shape, data=self.data[start:stop])
        return replace(self, shape=shape, row_order=self.row_order[start:stop])

    def dequantize(self, rows: slice = ALL, columns: slice = ALL) -> Floats:
        """Values of ``rows`` x ``columns`` (step 1) as float32, a fresh array.

        Only the blocks that hold these columns are read. A vector gives shape (rows,), and its
        pages are let go of at once: a page may be 2 MiB.
        """
        size = KINDS[self.kind].block_size
        if len(self.shape) == 1:
            vector = to_float32(self.packed(rows), self.kind).reshape(-1)
            self.release()
            return vector
        start, stop = bounds(columns, self.num_columns)
        first, last = start // size * size, min(-(-stop // size) * size, self.num_columns)
        values = to_float32(self.packed(rows, slice(first, last)), self.kind)
        if values.shape[1] == stop - start:
            return values
        return np.ascontiguousarray(values[:, start - first : stop - first])

    def file_rows(self, rows: slice) -> slice | Longs:
        """Where ``rows`` lie in the file."""
        start, stop = bounds(rows, self.num_rows)
        return slice(start, stop) if self.row_order is None else self.row_order[start:stop]

    def chunks(self, rows: slice = ALL, *, multiple: int = 1) -> Iterator[slice]:
        """Slices that together are ``rows``, so that a large tensor is read piece by piece.

        Each has a whole number of ``multiple`` rows but the last, and about ``CHUNK_BYTES`` of
        values as float32. The pages of one are let go of when the next is asked for, so use each
        before that.
        """
        for part in pieces(self, rows, multiple):
            yield part
            self.rows(part).release()

    def release(self) -> None:
        """Tell the system that this process is done with the tensor's pages.

        They leave the process's resident memory and stay in the page cache, so that reading a
        tensor again, here or in another process, is still fast. Views stay valid.
        """
        if self.row_order is None or not len(self.row_order):
            release(self.data)
        else:
            release(self.data[int(self.row_order.min()) : int(self.row_order.max()) + 1])


def release(data: Bytes) -> None:
    """Let go of the resident pages that hold a view of a mapped file, and of those around it.

    A page that is touched brings its neighbours along. Nothing happens where the bytes are not
    mapped or the system cannot do it.
    """
    owner = _mapping(data)
    if owner is None or data.size == 0:
        return
    base = np.frombuffer(owner, dtype=np.uint8).ctypes.data
    low, high = np.lib.array_utils.byte_bounds(data)
    start = max(0, low - base - AROUND_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
    stop = min(len(owner), high - base + AROUND_BYTES)
    owner.madvise(_LET_GO, start, stop - start)


def release_file(data: Bytes) -> None:
    """As ``release``, of the whole file that a view is of."""
    owner = _mapping(data)
    if owner is not None:
        owner.madvise(_LET_GO)


def mapping_of(data: npt.NDArray[Any]) -> mmap.mmap | None:
    """The mapping of a file behind a view; None where there is none."""
    owner: Any = data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, mmap.mmap) else None


def _mapping(data: Bytes) -> mmap.mmap | None:
    """The same; None also where there is no way to let go of its pages."""
    return mapping_of(data) if hasattr(mmap, "MADV_DONTNEED") else None


def pieces(weight: Weight, rows: slice, multiple: int) -> Iterator[slice]:
    """What ``Weight.chunks`` gives, without letting go of anything."""
    start, stop = bounds(rows, weight.num_rows)
    step = max(1, CHUNK_BYTES // (4 * weight.num_columns * multiple)) * multiple
    for at in range(start, stop, step):
        yield slice(at, min(at + step, stop))


def bounds(part: slice, size: int) -> tuple[int, int]:
    """Start and stop of a contiguous slice. Raises ValueError for another step."""
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError(f"only contiguous slices are read, not step {step}")
    return start, max(start, stop)
