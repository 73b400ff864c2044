"""The torch stage beside its logits: loading, types, order of rows, company, limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compute.errors import OutOfMemory, PeerLost
from compute.stage import Peers, Row
from compute.torch import latent
from compute.torch.cache import Cache
from compute.torch.decoder import Decoder
from compute.torch.engine import TorchStage
from compute.torch.linear import Blocks, Linear, multiply
from compute.torch.step import Step
from compute.torch.weights import load_weights
from models.checkpoint import Checkpoint, open_checkpoint
from models.footprint import footprint
from models.mesh import mesh, units_of, whole
from models.plans import slices_of
from models.sharding import RankShard
from models.spec import RopeSpec
from tests.compute.families import FAMILIES, NUM_SLOTS, VOCAB, on_torch, sequences
from tests.compute.oracle import ask
from tests.compute.thread_group import thread_groups

pytestmark = pytest.mark.slow
CONTEXT = 300


def loaded(checkpoint: Checkpoint, shard: RankShard | None = None, **options: Any) -> TorchStage:
    settings: dict[str, Any] = {
        "context_tokens": CONTEXT,
        "num_slots": NUM_SLOTS,
        "threads": 1,
        "device": "cpu",
        "on_progress": lambda done, total: None,
    }
    return TorchStage.load(checkpoint, shard or whole(checkpoint.spec), **(settings | options))


def error(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models stored in 16 bits, with transformers' logits of the same weights in float32."""
    root = tmp_path_factory.mktemp("halves")
    wanted = {"bfloat16": "deepseek_v3", "float16": "qwen3_moe"}
    ask(
        *(
            {"config": FAMILIES[name], "folder": str(root / dtype), "ids": sequences()}
            | {"dtype": dtype}
            for dtype, name in wanted.items()
        )
    )
    return {dtype: root / dtype for dtype in wanted}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_stay_so_and_multiply_in_float32(
    halves: dict[str, Path], dtype: str
) -> None:
    checkpoint = open_checkpoint(halves[dtype])
    with np.load(halves[dtype] / "logits.npz") as saved:
        reference = saved[saved.files[2]][-1]
    narrow = loaded(checkpoint)
    wide = loaded(checkpoint, dtype=torch.float32)
    row = Row(0, tuple(sequences()[2]), 0)
    for stage in (narrow, wide):
        assert error(stage.run([row], None, None)[0], reference) < 2e-4
    assert narrow.weights_bytes < 0.6 * wide.weights_bytes
    assert narrow.kv_bytes == wide.kv_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_throughout_is_near_float32(family_folders: dict[str, Path], name: str) -> None:
    """The types of a GPU, on the CPU.

    Where two experts are nearly as good a token may take the other one, which changes all that
    follows: so the usual error counts, not the largest (transformers in bfloat16 has the same).
    """
    folder = family_folders[name]
    with np.load(folder / "logits.npz") as saved:
        reference = saved[saved.files[2]]
    stage = loaded(open_checkpoint(folder), dtype=torch.bfloat16)
    rows = [Row(1, (token,), at) for at, token in enumerate(sequences()[2])]
    found = np.concatenate([stage.run([row], None, None) for row in rows])
    errors = np.abs(found - reference).max(-1) / np.abs(reference).max(-1)
    assert 1e-3 < np.median(errors) < 0.1
    assert stage.kv_bytes * 2 == loaded(open_checkpoint(folder)).kv_bytes


def padded(checkpoint: Checkpoint) -> TorchStage:
    """A stage whose multiplications have the row counts of a GPU's."""
    spec, shard, device = checkpoint.spec, whole(checkpoint.spec), torch.device("cpu")
    weights = load_weights(
        checkpoint,
        shard,
        device=device,
        compute=torch.float32,
        storage=torch.float32,
        on_progress=lambda done, total: None,
    )
    cache = Cache(
        spec,
        shard,
        context_tokens=CONTEXT,
        num_slots=NUM_SLOTS,
        device=device,
        dtype=torch.float32,
    )
    return TorchStage(
        Decoder(spec, shard, weights, cache, torch.float32),
        context_tokens=CONTEXT,
        num_slots=NUM_SLOTS,
        threads=1,
        device=device,
        padded=True,
        workspace_bytes=0,
    )


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_with_fixed_blocks_company_changes_no_bit(
    family_folders: dict[str, Path], name: str
) -> None:
    folder = family_folders[name]
    stage, ids = padded(open_checkpoint(folder)), sequences()[2]
    with np.load(folder / "logits.npz") as saved:
        reference = saved[saved.files[2]]
    alone = []
    for start, stop in ((0, 50), (50, 59), (59, 60)):
        alone.append(stage.run([Row(0, tuple(ids[start:stop]), start)], None, None)[0])
        assert error(alone[-1], reference[stop - 1]) < 2e-4
    others = [Row(1, tuple(ids[:45]), 0), Row(2, (7,), 0), Row(3, tuple(ids[:21]), 0)]
    for (start, stop), expected in zip(((0, 50), (50, 59), (59, 60)), alone, strict=True):
        rows = [*others[:2], Row(0, tuple(ids[start:stop]), start), others[2]]
        np.testing.assert_array_equal(stage.run(rows, None, None)[2], expected)


def test_blocks_cut_and_fill_rows() -> None:
    x = torch.arange(300.0)[:, None]
    seen: list[int] = []

    def double(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return part * 2

    for num_single, num_rows in ((0, 1), (1, 1), (16, 16), (17, 17), (3, 132), (20, 300)):
        seen.clear()
        torch.testing.assert_close(
            Blocks.of(num_single, num_rows).run(double, x[:num_rows]), 2 * x[:num_rows]
        )
        chunks = -(-(num_rows - num_single) // 128)
        assert seen == [16] * -(-num_single // 16) + [128] * chunks


def test_wide_matrices_are_multiplied_piece_by_piece() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(700, 301).bfloat16(), torch.randn(700)
    for rows in (1, 5):
        x = torch.randn(rows, 301)
        expected = x @ weight.float().T + bias
        torch.testing.assert_close(multiply(x, Linear(weight, bias)), expected)


def test_rows_come_back_in_the_callers_order(family_folders: dict[str, Path]) -> None:
    """Long and short rows, some that want no logits, over two stages."""
    checkpoint = open_checkpoint(family_folders["qwen3"])
    first, last = (
        loaded(checkpoint, shard)
        for shard in mesh(checkpoint.spec, ((1,), (1,)), split_embedding=True)
    )
    whole_stage, ids = loaded(checkpoint), sequences()[2]
    rows = [
        Row(2, tuple(ids[:30]), 0),
        Row(1, (5,), 0, want_logits=False),
        Row(0, tuple(ids[:8]), 0, want_logits=False),
        Row(3, (9,), 0),
    ]
    expected = [whole_stage.run([row], None, None)[0] for row in (rows[0], rows[3])]
    passed = first.run(rows, None, None)
    assert passed.shape == (40, 64)
    found = last.run(rows, passed, None)
    assert found.shape == (2, VOCAB)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    alone = first.run([rows[2]], None, None)
    np.testing.assert_allclose(passed[31:39], alone, atol=1e-4)
    for stage, residual in ((first, None), (last, passed)):
        quiet = [replace(row, want_logits=False) for row in rows]
        shape = (0, VOCAB) if stage is last else (40, 64)
        assert stage.run(quiet, residual, None).shape == shape
        assert stage.run([], None, None).shape == (0, shape[1])


def test_a_long_row_is_the_same_as_its_chunks(family_folders: dict[str, Path]) -> None:
    """256 positions at once, more than one piece of latent scores."""
    checkpoint = open_checkpoint(family_folders["deepseek_v2"])
    stage = loaded(checkpoint)
    ids = tuple(int(i) for i in np.random.default_rng(3).integers(0, VOCAB, 256))
    (at_once,) = stage.run([Row(0, ids, 0)], None, None)
    for start in range(0, 256, 64):
        found = stage.run([Row(1, ids[start : start + 64], start)], None, None)
    assert error(found[0], at_once) < 1e-4


def test_ways_of_latent_attention_agree() -> None:
    """At once, in pieces, and by the fused attention."""
    torch.manual_seed(1)
    q, seen = torch.randn(9, 4, 12), torch.randn(20, 12)
    mask = torch.arange(20) <= torch.arange(11, 20)[:, None]
    expected = latent.plain(q, seen, 8, mask, None)
    assert expected.shape == (9, 4, 8)
    torch.testing.assert_close(latent.plain(q, seen, 8, mask, None, most=160), expected)
    torch.testing.assert_close(latent.fused(q, seen, 8, mask), expected)
    for at in range(9):
        alone = latent.plain(q[at : at + 1], seen[: at + 12], 8, None, None)
        torch.testing.assert_close(alone[0], expected[at])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rank_reads_its_slice_and_says_so(family_folders: dict[str, Path], name: str) -> None:
    checkpoint = open_checkpoint(family_folders[name])
    spec = checkpoint.spec
    shares = ((1, 1), (1, 1))
    for shard in mesh(spec, shares, units=units_of(spec, checkpoint), split_embedding=True):
        seen: list[tuple[int, int]] = []
        stage = loaded(checkpoint, shard, on_progress=lambda *at, to=seen: to.append(at))
        parts = slices_of(spec, shard)
        elements = sum(
            int(np.prod([part.stop - part.start for part in kept])) for kept in parts.values()
        )
        assert stage.weights_bytes == 4 * elements
        assert seen[0] == (0, 4 * elements)
        assert seen[-1] == (4 * elements, 4 * elements)
        assert seen == sorted(seen)
        expected = footprint(
            spec,
            checkpoint,
            shard,
            kernels="torch",
            device="cpu",
            context_tokens=CONTEXT,
            num_slots=NUM_SLOTS,
            threads=1,
        )
        assert (stage.weights_bytes, stage.kv_bytes, stage.workspace_bytes) == (
            expected.weights_bytes,
            expected.kv_bytes,
            expected.workspace_bytes,
        )
        assert (stage.kernels, stage.device, stage.shard) == ("torch", "cpu:0", shard)


def test_a_lost_peer_ends_the_step(family_folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(family_folders["llama"])
    shards = mesh(checkpoint.spec, ((1, 1),), split_embedding=True)
    stage, group = on_torch(checkpoint, shards[0]), thread_groups(2)[0]
    peers = Peers(group, tuple(shard.vocab for shard in shards), 0.05)
    with pytest.raises(PeerLost):
        stage.run([Row(0, (1, 2), 0)], None, peers)


def test_what_cannot_be_is_refused(family_folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(family_folders["llama"])
    with pytest.raises(OutOfMemory, match="GiB"):
        loaded(checkpoint, context_tokens=2**40, num_slots=2**10)
    stage = loaded(checkpoint)
    stage.close()
    stage.close()
    with pytest.raises(ValueError, match="closed"):
        stage.run([Row(0, (1,), 0)], None, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_named(family_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no device cuda:1: torch sees 0 CUDA devices"):
        loaded(open_checkpoint(family_folders["llama"]), device="cuda:1")


def test_a_step_puts_single_tokens_first() -> None:
    rows = [Row(4, (1, 2, 3), 7), Row(2, (5,), 0), Row(0, (6, 7), 1, want_logits=False)]
    step = Step(rows, device=torch.device("cpu"), padded=True)
    assert step.ids_N.tolist() == [5, 1, 2, 3, 6, 7]
    assert [span.slot for span in step.spans] == [2, 4, 0]
    assert step.positions_N.tolist() == [0, 7, 8, 9, 1, 2]
    assert step.order is not None
    assert step.order.tolist() == [3, 0, 1, 2, 4, 5]
    assert step.ends.tolist() == [3, 0]
    assert step.blocks.cuts == ((0, 1, 16), (1, 6, 128))
    masks = [step.mask(span, 2) for span in step.spans]
    assert masks[0] is None
    assert masks[1] is not None
    # position 7 sees 6 and 7, and so on: positions from 6 on
    assert masks[1].int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_rotations_of_a_step_follow_positions_and_divisors() -> None:
    step = Step([Row(0, (1, 1), 5)], device=torch.device("cpu"), padded=False)
    rope = RopeSpec(theta=100.0, dim=4, scaling="divisors", divisors=(1.0, 4.0))
    cosines, sines = step.turns(rope)
    angles = torch.tensor([[[5.0, 5 / 10 / 4]], [[6.0, 6 / 10 / 4]]])
    torch.testing.assert_close(cosines, angles.cos())
    torch.testing.assert_close(sines, angles.sin())
    assert step.turns(rope)[0] is cosines
