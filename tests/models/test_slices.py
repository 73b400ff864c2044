"""Any part of a weight equals that part of the whole, in every format; only its pages are read."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import open_checkpoint
from models.memory import stored_bytes
from models.mesh import grid, mesh, units_of, whole
from models.plans import slices_of
from models.quant import E4M3, KINDS, SUPPORTED
from models.weights import CHUNK_BYTES, Weight
from tests.models.test_memory import resident_bytes
from tests.models.tiny import llama_tensors, random_blocks, write_gguf

ROWS, COLUMNS = 40, 768
HUGE = 4 << 20  # pages that the system brings along, at both ends


def stored(kind: str) -> tuple[Weight, npt.NDArray[np.float32]]:
    """A weight and its values by the gguf package (fp8: by the table of its codes)."""
    if kind == "F8_E4M3":
        data = np.random.default_rng(1).integers(0, 127, (ROWS, COLUMNS), dtype=np.uint8)
        return Weight("w", (ROWS, COLUMNS), kind, data), E4M3[data]
    data = random_blocks(kind, ROWS, COLUMNS, seed=5)
    values = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(ROWS, COLUMNS)
    return Weight("w", (ROWS, COLUMNS), kind, data), np.asarray(values, dtype=np.float32)


STORED = {kind: stored(kind) for kind in (*SUPPORTED, "F8_E4M3")}


def between(draw: st.DrawFn, size: int) -> slice:
    start, stop = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
    return slice(start, stop)


@st.composite
def parts(draw: st.DrawFn) -> tuple[slice, slice]:
    return between(draw, ROWS), between(draw, COLUMNS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(STORED))
@settings(max_examples=40, deadline=None)
@given(part=parts(), order=st.none() | st.permutations(range(ROWS)))
def test_any_part_is_that_part_of_the_whole(
    kind: str, part: tuple[slice, slice], order: list[int] | None
) -> None:
    weight, values = STORED[kind]
    if order is not None:
        rows_in_file = np.array(order, dtype=np.int64)
        weight = Weight("w", weight.shape, kind, weight.data, rows_in_file)
        values = values[rows_in_file]
    rows, columns = part
    np.testing.assert_array_equal(weight.dequantize(rows, columns), values[rows, columns])
    narrow = weight.rows(rows)
    np.testing.assert_array_equal(narrow.dequantize(columns=columns), values[rows, columns])
    size = KINDS[kind].block_size
    cut = slice(columns.start // size * size, -(-columns.stop // size) * size)
    packed = weight.packed(rows, cut)
    again = Weight("w", (packed.shape[0], cut.stop - cut.start), kind, packed)
    np.testing.assert_array_equal(again.dequantize(), values[rows, cut])


@given(start=st.integers(0, 30), stop=st.integers(0, 5000), multiple=st.integers(1, 64))
def test_chunks_are_the_rows_in_order(start: int, stop: int, multiple: int) -> None:
    weight = Weight("w", (5000, 2048), "F8_E4M3", np.zeros((5000, 1), dtype=np.uint8))
    chunks = list(weight.chunks(slice(start, stop), multiple=multiple))
    assert [row for chunk in chunks for row in range(5000)[chunk]] == list(range(start, stop))
    for chunk in chunks[:-1]:
        assert (chunk.stop - chunk.start) % multiple == 0
        assert (chunk.stop - chunk.start - multiple) * 2048 * 4 <= CHUNK_BYTES


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 46 MB in Q8_0."""
    tensors = llama_tensors(
        layers=3, hidden=1024, heads=8, kv_heads=8, ffn=4096, vocab=128, kind="F32"
    )
    for name, (values, _) in list(tensors.items()):
        if values.dtype == np.uint8:
            shape = (len(values), values.shape[1] // 4 // 32 * 34)
            tensors[name] = (np.zeros(shape, dtype=np.uint8), "Q8_0")
    folder = tmp_path_factory.mktemp("large")
    heads = {"attention.head_count": 8, "attention.head_count_kv": 8}
    return write_gguf(folder / "large.gguf", tensors, metadata=heads)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from /proc")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_of_a_pipeline_reads_its_layers_alone(large: Path, stage: int) -> None:
    checkpoint = open_checkpoint(large)
    shard = mesh(checkpoint.spec, grid([1], [1, 1, 1]))[stage]
    checkpoint.release()
    before = resident_bytes(large)
    for name, part in slices_of(checkpoint.spec, shard).items():
        weight = checkpoint.tensor(name)
        if len(part) == 2:
            weight.packed(*part).sum()
    slice_bytes = stored_bytes(checkpoint.spec, checkpoint, shard)
    assert slice_bytes < 0.4 * checkpoint.size_bytes
    assert resident_bytes(large) - before <= slice_bytes + HUGE
    checkpoint.release()
    assert resident_bytes(large) <= before + 65536


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from /proc")
def test_rows_cut_by_a_tensor_rank_are_all_that_is_read(large: Path) -> None:
    checkpoint = open_checkpoint(large)
    spec = checkpoint.spec
    shard = mesh(spec, grid([1, 1, 1, 1]), units=units_of(spec, checkpoint))[2]
    for name, part in slices_of(spec, shard).items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weight = checkpoint.tensor(name)
            checkpoint.release()
            before = resident_bytes(large)
            weight.packed(*part).sum()
            # a quarter of 4.4 MB, and what the system brings along
            assert resident_bytes(large) - before <= weight.size_bytes // 4 + HUGE // 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from /proc")
def test_reading_in_chunks_keeps_little_of_the_file_in_memory(large: Path) -> None:
    checkpoint = open_checkpoint(large)
    checkpoint.release()
    most = 0
    for name, part in slices_of(checkpoint.spec, whole(checkpoint.spec)).items():
        weight = checkpoint.tensor(name)
        for rows in weight.chunks(part[0]):
            weight.dequantize(rows, *part[1:])
            most = max(most, resident_bytes(large))
    assert most <= CHUNK_BYTES + HUGE
