"""``kv_b_proj`` of GGUF files that keep its two halves apart, the keys' half transposed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from models.quant import Bytes, Floats
from models.weights import ALL, Weight, bounds


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class JoinedWeight(Weight):
    """Per head the rows of a key without position, then those of a value.

    ``kind`` is JOINED: there are no rows of blocks to give, only values.

    Attributes:
        keys: (heads * kv_rank, nope_dim), ``attn_k_b`` as stored: latent by feature of a head.
        values: (heads * v_dim, kv_rank), ``attn_v_b``.
        first_row: of the whole matrix, where this begins.

    Source: llama.cpp ``convert_hf_to_gguf.py``, ``DeepseekV2Model.modify_tensors``.
    """

    keys: Weight
    values: Weight
    first_row: int = 0

    @property
    def block_columns(self) -> int:
        """Columns that are stored together, of the values' half."""
        return self.values.block_columns

    @property
    def size_bytes(self) -> int:
        """Bytes of both halves in the file."""
        return self.keys.size_bytes + self.values.size_bytes

    def packed(self, rows: slice = ALL, columns: slice = ALL) -> Bytes:
        """Always refused: half of the rows lie across blocks. Raises ValueError."""
        raise ValueError(f"{self.name}: {self.kind} has no blocks by rows; dequantize it")

    def rows(self, rows: slice) -> JoinedWeight:
        """The same tensor, narrowed to ``rows``."""
        start, stop = bounds(rows, self.num_rows)
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, first_row=self.first_row + start)

    def dequantize(self, rows: slice = ALL, columns: slice = ALL) -> Floats:
        """Values of ``rows`` x ``columns`` (step 1) as float32, a fresh array."""
        start, stop = (self.first_row + at for at in bounds(rows, self.num_rows))
        low, high = bounds(columns, self.num_columns)
        rank, plain = self.num_columns, self.keys.num_columns
        size = plain + self.values.num_rows * rank // self.keys.num_rows
        out = np.empty((stop - start, high - low), dtype=np.float32)
        for head in range(start // size, -(-stop // size)):
            at = head * size
            a, b = max(start, at), min(stop, at + plain)
            if a < b:
                latent = slice(head * rank + low, head * rank + high)
                keys = self.keys.dequantize(latent, slice(a - at, b - at))
                out[a - start : b - start] = keys.T
            a, b = max(start, at + plain), min(stop, at + size)
            if a < b:
                skipped = at + plain - head * (size - plain)
                values = self.values.dequantize(slice(a - skipped, b - skipped), columns)
                out[a - start : b - start] = values
        return out

    def release(self) -> None:
        """See :meth:`Weight.release`."""
        self.keys.release()
        self.values.release()


def join(name: str, keys: Weight, values: Weight) -> JoinedWeight:
    """Put both halves together: ``keys`` (heads, kv_rank, nope) and ``values`` (heads, v, kv_rank).

    Raises:
        ValueError: shapes that do not belong together.
    """
    if len(keys.shape) != 3 or len(values.shape) != 3:
        raise ValueError(f"{keys.shape} and {values.shape} are not three-dimensional")
    heads, rank, plain = keys.shape
    if values.shape[0] != heads or values.shape[2] != rank:
        raise ValueError(f"keys of {keys.shape} beside values of {values.shape}")
    height = values.shape[1]
    return JoinedWeight(
        name,
        (heads * (plain + height), rank),
        "JOINED",
        keys.data,
        keys=replace(keys, shape=(heads * rank, plain)),
        values=replace(values, shape=(heads * height, rank)),
    )
