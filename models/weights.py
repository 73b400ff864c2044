"""One stored tensor: reads only the rows asked for, packed as in the file or as float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.quant import KINDS, Bytes, Floats, to_float32

ALL = slice(None)


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A view of one tensor in a mapped file.

    A vector of n elements counts as n rows of one column, so that rows mean the same in a bias
    as in its matrix.

    Attributes:
        name: canonical name.
        shape: (out_features, in_features), or (n,).
        kind: storage format, a key of ``models.quant.KINDS``.
        data: uint8 (rows, bytes_per_row) over the mapping; rows in file order.
        row_order: int64 (rows,): file row of each row, where the file orders them otherwise.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Bytes
    row_order: npt.NDArray[np.int64] | None = None

    @property
    def num_rows(self) -> int:
        """Rows (elements of a vector)."""
        return self.shape[0]

    @property
    def num_columns(self) -> int:
        """Columns (1 for a vector)."""
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def size_bytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return int(self.data.size)

    def packed(self, rows: slice = ALL) -> Bytes:
        """Raw blocks of ``rows`` (step 1): uint8 (rows, bytes_per_row).

        A read-only view of the mapping where rows lie in order, else a copy of those rows.
        """
        start, stop = _bounds(rows, self.num_rows)
        if self.row_order is None:
            return self.data[start:stop]
        return self.data[self.row_order[start:stop]]

    def rows(self, rows: slice) -> Weight:
        """The same tensor, narrowed to ``rows``."""
        start, stop = _bounds(rows, self.num_rows)
        shape = (stop - start, *self.shape[1:])
        if self.row_order is None:
            return Weight(self.name, shape, self.kind, self.data[start:stop])
        return Weight(self.name, shape, self.kind, self.data, self.row_order[start:stop])

    def dequantize(self, rows: slice = ALL, columns: slice = ALL) -> Floats:
        """Values of ``rows`` x ``columns`` (step 1) as float32, a fresh array.

        Only the blocks that hold these columns are read. A vector gives shape (rows,).
        """
        kind = KINDS[self.kind]
        packed = self.packed(rows)
        if len(self.shape) == 1:
            return to_float32(packed, self.kind).reshape(-1)
        start, stop = _bounds(columns, self.num_columns)
        first, last = start // kind.block_size, -(-stop // kind.block_size)
        packed = packed[:, first * kind.block_bytes : last * kind.block_bytes]
        offset = first * kind.block_size
        values = to_float32(packed, self.kind)
        if values.shape[1] == stop - start:
            return values
        return np.ascontiguousarray(values[:, start - offset : stop - offset])


def _bounds(part: slice, size: int) -> tuple[int, int]:
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError(f"only contiguous slices are read, not step {step}")
    return start, max(start, stop)
