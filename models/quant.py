"""Number formats of stored weights: block sizes, and exact dequantisation to float32 with numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Kind:
    """One storage format: ``block_size`` weights take ``block_bytes`` bytes."""

    name: str
    block_size: int
    block_bytes: int


SUPPORTED = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
KINDS: dict[str, Kind] = {
    name: Kind(name, *GGML_QUANT_SIZES[GGMLQuantizationType[name]]) for name in SUPPORTED
} | {"F8_E4M3": Kind("F8_E4M3", 1, 1)}


def _e4m3() -> Floats:
    """Value of each byte: sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity.

    Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning, E4M3.
    """
    codes = np.arange(128)
    exponent, fraction = codes >> 3, codes & 7
    normal = (1 + fraction / 8) * np.exp2(exponent - 7.0)
    values = np.where(exponent == 0, fraction / 8 * 2.0**-6, normal)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3 = _e4m3()


def to_float32(packed: Bytes, kind: str) -> Floats:
    """Dequantise rows of raw blocks.

    Args:
        packed: uint8 (rows, bytes_per_row), whole blocks.
        kind: a key of ``KINDS``.

    Returns:
        float32 (rows, columns), a fresh array; the value of every weight is exactly what the
        format defines in float32 arithmetic.

    Source: ggml's ``dequantize_row_*``, through the ``gguf`` package.
    """
    rows = packed.shape[0]
    columns = packed.shape[1] // KINDS[kind].block_bytes * KINDS[kind].block_size
    packed = np.ascontiguousarray(packed)
    if packed.size == 0:
        return np.zeros((rows, columns), dtype=np.float32)
    values: npt.NDArray[Any]
    if kind == "F32":
        values = packed.view(np.float32).copy()
    elif kind == "F16":
        values = packed.view(np.float16).astype(np.float32)
    elif kind == "BF16":
        values = (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif kind == "F8_E4M3":
        values = E4M3[packed]
    elif kind in SIMPLE:
        values = _simple(packed.reshape(-1, KINDS[kind].block_bytes), kind)
    else:
        values = np.asarray(dequantize(packed, GGMLQuantizationType[kind]), dtype=np.float32)
    return values.reshape(rows, columns)


SIMPLE = ("Q4_0", "Q4_1", "Q8_0")
CHUNK_BLOCKS = 4096  # 512 KiB of results: temporaries stay in the cache


def _simple(blocks: Bytes, kind: str) -> Floats:
    """The commonest types, several times faster than row by row: uint8 (blocks, block_bytes)."""
    out = np.empty((len(blocks), KINDS[kind].block_size), dtype=np.float32)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        part, into = blocks[start : start + CHUNK_BLOCKS], out[start : start + CHUNK_BLOCKS]
        scale = part[:, :2].copy().view(np.float16).astype(np.float32)
        if kind == "Q8_0":
            np.multiply(part[:, 2:].view(np.int8), scale, out=into)
            continue
        nibbles = part[:, 4:] if kind == "Q4_1" else part[:, 2:]
        into[:, :16], into[:, 16:] = nibbles & 15, nibbles >> 4
        if kind == "Q4_1":
            into *= scale
            into += part[:, 2:4].copy().view(np.float16).astype(np.float32)
        else:
            into -= 8
            into *= scale
    return out
