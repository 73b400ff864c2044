"""Memory estimates by hand-made sums, and what a rank's reading of its slice touches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.memory import MemoryEstimate, Packing, estimate, kv_elements
from models.mesh import Units, grid, mesh, units_of
from models.plans import slices_of
from models.safetensors_files import open_safetensors
from models.spec import ModelSpec
from models.stored import Assumed
from models.weights import Weight
from tests.models.specs import FAMILIES, small
from tests.models.tiny import llama_tensors, write_gguf, write_safetensors

BF16 = Packing(bytes_per_weight={"F32": 2.0}, otherwise=2.0)
TILED = Packing(bytes_per_weight={"Q4_1": 0.625, "F32": 4.0}, tile=(32, 32), group=32)


def of(spec: ModelSpec, rank: int, shares: list[float], packing: Packing) -> MemoryEstimate:
    return estimate(
        spec,
        Assumed("F32" if packing is BF16 else "Q4_1"),
        mesh(spec, grid(shares))[rank],
        context_tokens=100,
        num_slots=3,
        kv_bytes_per_element=2,
        workspace_bytes=1000,
        packing=packing,
        page_tokens=64,
    )


def test_a_whole_dense_model() -> None:
    found = of(small("llama-tied"), 0, [1], BF16)
    matrices = 200 * 96 + 6 * (2 * 128 * 96 + 2 * 64 * 96 + 3 * 160 * 96)
    norms = 96 + 6 * 2 * 96
    assert found.weights_bytes == 2 * matrices + 4 * norms
    assert found.kv_bytes == 6 * 2 * 4 * 16 * 128 * 3 * 2
    assert found.total_bytes == found.weights_bytes + found.kv_bytes + 1000


def test_tiles_are_padded_and_a_cut_inside_a_group_unpacks() -> None:
    part = TILED.matrix_bytes("Q4_1", slice(0, 33), slice(32, 64))
    assert part == 64 * 32 * 0.625
    assert TILED.matrix_bytes("Q4_1", slice(0, 32), slice(16, 48)) == 32 * 32 * 4
    assert TILED.matrix_bytes("F32", slice(0, 32), slice(16, 49)) == 32 * 64 * 4
    assert TILED.matrix_bytes("Q9", slice(0, 32), slice(0, 32)) == 32 * 32 * 4


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "deepseek_v3"])
def test_ranks_together_hold_the_model_and_some_copies(name: str) -> None:
    spec = small(name)
    whole = of(spec, 0, [1], BF16)
    parts = [of(spec, rank, [2, 1], BF16) for rank in range(2)]
    assert whole.weights_bytes < sum(p.weights_bytes for p in parts) < 1.5 * whole.weights_bytes
    assert parts[0].weights_bytes > parts[1].weights_bytes
    replicated = name in ("gemma3", "deepseek_v3")
    assert sum(p.kv_bytes for p in parts) == whole.kv_bytes * (2 if replicated else 1)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_layers_that_are_stored_alike_are_summed_as_if_one_by_one(name: str) -> None:
    """Formats change from one layer to the next; the sum is that over every single weight."""

    class Mixed:
        def tensor(self, name: str) -> Assumed:
            return Assumed("F32" if "layers.3." in name or "experts.1." in name else "Q4_1")

    spec = small(name)
    for shard in mesh(spec, grid([2, 1], [1, 1])):
        expected = 0
        for weight, part in slices_of(spec, shard).items():
            if len(part) == 1:
                expected += 4 * -(-(part[0].stop - part[0].start) // 32) * 32
            else:
                kind = Mixed().tensor(weight).kind
                expected += TILED.matrix_bytes(kind, *part, name=weight)
        found = estimate(
            spec,
            Mixed(),
            shard,
            context_tokens=1,
            num_slots=1,
            kv_bytes_per_element=2,
            workspace_bytes=0,
            packing=TILED,
        )
        assert found.weights_bytes == expected


def test_every_rank_has_the_whole_latent_cache() -> None:
    spec = small("deepseek_v3")
    first, second = mesh(spec, grid([1, 1]))
    assert kv_elements(spec, first) == kv_elements(spec, second) == 6 * (32 + 8)


def test_sizes_that_cannot_be() -> None:
    spec = small("llama")
    with pytest.raises(ValueError, match="context_tokens=0"):
        estimate(
            spec,
            Assumed("F32"),
            mesh(spec, grid([1]))[0],
            context_tokens=0,
            num_slots=1,
            kv_bytes_per_element=2,
            workspace_bytes=0,
            packing=BF16,
        )


@pytest.mark.slow
def test_units_come_from_the_stored_blocks(tmp_path: Path) -> None:
    tensors = llama_tensors(hidden=256, ffn=512, kind="Q4_K")
    plain = llama_tensors(hidden=256, ffn=512, kind="Q4_0")
    for name in ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight"):
        plain[name] = tensors[name]
        checkpoint = open_checkpoint(write_gguf(tmp_path / f"{name}.gguf", plain))
        assert units_of(checkpoint.spec, checkpoint) == Units(ffn=256)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", llama_tensors()))
    assert units_of(checkpoint.spec, checkpoint) == Units()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("shares", [[1, 1], [1, 1, 1], [1] * 4, [5, 1]])
def test_parts_of_ranks_are_parts_of_the_model(
    tmp_path: Path, kind: str, shares: list[float]
) -> None:
    """Nine interleaved heads: each rank's packed part equals that part of the whole."""
    tensors = llama_tensors(hidden=288, heads=9, kv_heads=3, ffn=160, kind=kind)
    path = write_gguf(
        tmp_path / "m.gguf",
        tensors,
        metadata={"attention.head_count": 9, "attention.head_count_kv": 3},
    )
    checkpoint = open_checkpoint(path)
    shards = mesh(checkpoint.spec, grid(shares), units=units_of(checkpoint.spec, checkpoint))
    for shard in shards:
        for name, part in slices_of(checkpoint.spec, shard).items():
            weight = checkpoint.tensor(name)
            whole = weight.dequantize()
            np.testing.assert_array_equal(weight.dequantize(*part), whole[part])
            if len(part) == 1:
                continue
            rows, columns = part
            packed = weight.packed(rows, columns)
            height, width = rows.stop - rows.start, columns.stop - columns.start
            narrow = Weight(name, (height, width), kind, packed)
            np.testing.assert_array_equal(narrow.dequantize(), whole[part])
            if weight.row_order is None:
                assert np.shares_memory(packed, weight.data)
            np.testing.assert_array_equal(
                weight.rows(rows).packed(slice(1, 3), columns), packed[1:3]
            )


def test_columns_inside_a_block_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_tensors(kind="Q4_0"))
    weight = open_checkpoint(path).tensor("layers.0.mlp.down_proj.weight")
    with pytest.raises(ValueError, match=r"down_proj.*columns 16:64 cut blocks of 32"):
        weight.packed(columns=slice(16, 64))
    with pytest.raises(ValueError, match="step 2"):
        weight.packed(slice(0, 8, 2))


HUGE = 4 << 20  # the system maps cached files by up to 2 MiB, at both ends


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file in this process's resident memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from /proc")
def test_a_rank_touches_only_its_rows_and_lets_go_of_them(tmp_path: Path) -> None:
    shape = (2048, 8192)
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": ("F16", shape, bytes(2 * shape[0] * shape[1]))})
    stored = open_safetensors(path)["w"]
    weight = Weight("w", shape, "F16", stored.data.reshape(shape[0], -1))
    weight.release()
    before = resident_bytes(path)
    weight.dequantize(slice(512, 1024))
    quarter = 2 * 512 * shape[1]
    assert quarter <= resident_bytes(path) - before <= quarter + HUGE
    weight.release()
    assert resident_bytes(path) <= before + HUGE
    order = np.roll(np.arange(shape[0]), 7)  # another order of rows
    turned = Weight("w", shape, "F16", weight.data, order)
    turned.dequantize(slice(512, 1024))
    assert quarter <= resident_bytes(path) - before <= quarter + HUGE
    turned.release()
    assert not weight.dequantize(slice(0, 2)).any()  # views stay valid


def test_letting_go_of_what_is_not_mapped_does_nothing() -> None:
    data = np.ones((4, 8), dtype=np.uint8)
    Weight("w", (4, 2), "F32", data).release()
    assert data.all()
