"""Stored blocks in MLX's affine form hold the file's numbers exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.mlx.pack import BITS, can_pack, pack_bits
from models.quant import SUPPORTED
from models.weights import Weight
from tests.models.tiny import random_blocks

pytest.importorskip("mlx.core")
import mlx.core as mx

from compute.mlx.matrix import Dense, Packed, load_matrix, load_stack

ALL = slice(None)
ROWS, COLUMNS = 40, 512


def weight(kind: str, seed: int = 0, *, shuffled: bool = False) -> Weight:
    order = np.random.default_rng(1).permutation(ROWS) if shuffled else None
    data = random_blocks(kind, ROWS, COLUMNS, seed)
    return Weight(f"{kind}.weight", (ROWS, COLUMNS), kind, data, order)


@given(bits=st.integers(1, 8), rows=st.integers(1, 3), groups=st.integers(1, 3), seed=st.integers())
def test_numbers_are_one_stream_of_bits(bits: int, rows: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(abs(seed))
    numbers = rng.integers(0, 1 << bits, (rows, groups, 32), dtype=np.uint8)
    words = pack_bits(numbers, bits)
    assert words.shape == (rows, groups * bits)
    for row, stream in zip(numbers.reshape(rows, -1), words, strict=True):
        whole = int.from_bytes(stream.astype("<u4").tobytes(), "little")
        assert [whole >> (bits * i) & ((1 << bits) - 1) for i in range(len(row))] == row.tolist()


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("columns", [ALL, slice(32, 352), slice(256, 512), slice(16, 48)])
def test_values_are_those_of_the_file(kind: str, columns: slice) -> None:
    stored, rows = weight(kind, shuffled=kind == "Q4_0"), slice(3, 37)
    matrix = load_matrix(stored, rows, columns, mx.float32)
    expected = stored.dequantize(rows, columns)
    assert isinstance(matrix, Packed) == (kind in BITS and columns != slice(16, 48))
    assert isinstance(matrix, Packed) == can_pack(stored, columns)
    found = np.array(matrix.rows(mx.arange(34)))
    np.testing.assert_array_equal(found, expected)
    x = np.random.default_rng(2).standard_normal((5, expected.shape[1])).astype(np.float32)
    exact = x.astype(np.float64) @ expected.T.astype(np.float64)
    for part, got in (
        (ALL, matrix.multiply(mx.array(x))),
        (slice(8, 20), matrix.between(8, 20).multiply(mx.array(x))),
    ):
        np.testing.assert_allclose(
            np.array(got), exact[:, part], atol=1e-5 * float(np.abs(exact).max())
        )
    if isinstance(matrix, Packed):
        assert matrix.num_bytes == expected.size * BITS[kind] // 8 + expected.size // 32 * 8


@pytest.mark.parametrize(
    "kinds", [("Q4_1",), ("Q5_K",), ("Q8_0",), ("F32",), ("Q6_K",), ("Q4_0", "Q8_0")]
)
def test_stacks_of_experts(kinds: tuple[str, ...]) -> None:
    weights = [weight(kinds[n % len(kinds)], n) for n in range(3)]
    rows, columns = slice(8, 40), slice(64, 256)
    stack = load_stack(weights, rows, columns, mx.float32)
    assert isinstance(stack, Packed) == (len(kinds) == 1 and kinds[0] in BITS)
    values = np.stack([w.dequantize(rows, columns) for w in weights])
    experts = np.array([[2, 0], [1, 1], [0, 2], [1, 0]], dtype=np.uint32)
    x = np.random.default_rng(3).standard_normal((4, 2, 192)).astype(np.float32)
    for given_x in (x, x[:, :1]):
        found = np.array(stack.by_expert(mx.array(given_x), mx.array(experts)))
        exact = np.einsum("nai,naoi->nao", np.broadcast_to(given_x, x.shape), values[experts])
        np.testing.assert_allclose(found, exact, atol=1e-5 * float(np.abs(exact).max()))


def test_scales_beyond_half_precision_are_not_lost() -> None:
    data = random_blocks("Q8_0", ROWS, COLUMNS).reshape(ROWS, -1, 34)
    data[3, 5, :2] = np.array([1000.0], dtype=np.float16).view(np.uint8)  # x 128 is no half
    stored = Weight("w", (ROWS, COLUMNS), "Q8_0", data.reshape(ROWS, -1))
    assert isinstance(load_matrix(stored, ALL, ALL, mx.bfloat16), Packed)
    assert isinstance(load_matrix(stored, slice(4, 40), ALL, mx.float16), Packed)
    dense = load_matrix(stored, ALL, ALL, mx.float16)
    assert isinstance(dense, Dense)
    assert dense.weight.dtype == mx.float16
