"""The MLX stage over meshes: ranks as threads, against the torch stage on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from compute.errors import PeerLost
from compute.stage import Peers, Row, Stage
from compute.torch.engine import TorchStage
from models.mesh import Experts, grid, mesh, units_of, whole
from models.sharding import RankShard
from tests.compute.made import MadeCheckpoint, made
from tests.compute.thread_group import thread_groups, together
from tests.models.specs import FAMILIES, small

pytest.importorskip("mlx.core")
import mlx.core as mx

from compute.mlx.stage import MlxStage, activation_type
from compute.mlx.step import attend

pytestmark = pytest.mark.slow

Floats = npt.NDArray[np.float32]
CONTEXT, SLOTS = 64, 3
# two sequences in chunks, alone and together, beyond the window of 8, then token by token
STEPS: tuple[tuple[Row, ...], ...] = (
    (Row(0, tuple(range(1, 6)), 0), Row(2, (5, 9), 0)),
    (Row(0, tuple(range(20, 37)), 5, want_logits=False),),
    (Row(2, (150, 160, 170), 2), Row(0, (7, 8, 9), 22)),
    (Row(0, (11,), 25), Row(2, (199,), 5)),
    (Row(2, (3,), 6, want_logits=False),),
    (Row(2, (4,), 7), Row(0, (0,), 26)),
)
MESHES: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "one": ((1,), (1,)),
    "tensor 2,1": ((2, 1), (1,)),
    "tensor 3": ((1, 1, 1), (1,)),
    "pipeline 2": ((1,), (1, 1)),
    "mesh 1,2 x 2": ((1, 2), (1, 1)),
}
FIELDS: dict[str, dict[str, Any]] = {
    "gemma3": {"sliding_window": 8, "final_logit_softcapping": 20.0},
    "llama": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mixtral": {"sliding_window": 8},
}


def shards(
    checkpoint: MadeCheckpoint,
    tensor: Sequence[float],
    pipeline: Sequence[float] = (1,),
    experts: Experts = "inside",
) -> tuple[RankShard, ...]:
    spec = checkpoint.spec
    units = units_of(spec, checkpoint)
    return mesh(spec, grid(tensor, pipeline), units=units, experts=experts, split_embedding=True)


def load(checkpoint: MadeCheckpoint, shard: RankShard, **options: Any) -> MlxStage:
    told: list[tuple[int, int]] = []
    stage = MlxStage.load(
        checkpoint,
        shard,
        context_tokens=CONTEXT,
        num_slots=SLOTS,
        on_progress=lambda done, total: told.append((done, total)),
        **options,
    )
    assert told[0] == (0, told[-1][1])
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    return stage


def run(
    ranks: Sequence[RankShard], stages: Sequence[Stage], steps: Sequence[Sequence[Row]] = STEPS
) -> list[Floats]:
    """Logits of every step, the same on all ranks of the last stage."""
    world = ranks[0].tensor.world_size
    vocab = tuple(shard.vocab for shard in ranks[:world])
    rows = [range(at, at + world) for at in range(0, len(ranks), world)]
    groups = [thread_groups(world) for _ in rows]
    logits = []
    for step in steps:
        out: list[Floats | None] = [None]
        for members, group in zip(rows, groups, strict=True):
            peers = [Peers(end, vocab, 20.0) if world > 1 else None for end in group]
            calls = [
                partial(stages[rank].run, step, out[0], end)
                for rank, end in zip(members, peers, strict=True)
            ]
            found = together(calls, group)
            for other in found[1:]:
                np.testing.assert_array_equal(other, found[0])
            out = [found[0]]
        assert out[0] is not None
        logits.append(out[0])
    return logits


def torch_logits(
    checkpoint: MadeCheckpoint, steps: Sequence[Sequence[Row]] = STEPS
) -> list[Floats]:
    """What the torch engine says, on one rank in float32."""
    stage = TorchStage.load(
        checkpoint,
        whole(checkpoint.spec),
        context_tokens=CONTEXT,
        num_slots=SLOTS,
        threads=1,
        device="cpu",
        on_progress=lambda done, total: None,
    )
    return [stage.run(step, None, None) for step in steps]


def error(found: Sequence[Floats], expected: Sequence[Floats]) -> float:
    """Largest difference, in units of the largest logit."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == np.float32
    return float(np.abs(np.concatenate(found) - np.concatenate(expected)).max()) / float(
        np.abs(np.concatenate(expected)).max()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_every_family_on_every_mesh(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = made(small(name, **FIELDS.get(name, {})))
    expected = torch_logits(checkpoint)
    errors = {}
    for text, (tensor, pipeline) in MESHES.items():
        ranks = shards(checkpoint, tensor, pipeline)
        errors[text] = error(run(ranks, [load(checkpoint, rank) for rank in ranks]), expected)
    if checkpoint.spec.experts is not None:
        ranks = shards(checkpoint, (2, 1), experts="across")
        errors["across 2,1"] = error(
            run(ranks, [load(checkpoint, rank) for rank in ranks]), expected
        )
    with capsys.disabled():
        print(f"\n{name}: " + ", ".join(f"{text} {e:.1e}" for text, e in errors.items()), end="")
    assert max(errors.values()) < 2e-4


def test_a_row_does_not_see_its_neighbours_or_who_had_its_slot_before() -> None:
    checkpoint = made(small("gemma3", sliding_window=8))
    stage = load(checkpoint, whole(checkpoint.spec))
    ids = tuple(range(3, 40))
    (first,) = stage.run([Row(1, ids, 0)], None, None)
    stage.run([Row(1, (9,) * 60, 0), Row(0, (5,), 0)], None, None)
    stage.run([Row(1, ids[:30], 0), Row(0, (6, 7), 1), Row(2, (1, 2), 0)], None, None)
    again = stage.run([Row(2, (3,), 2), Row(1, ids[30:], 30)], None, None)[1]
    np.testing.assert_allclose(again, first, atol=1e-4 * float(np.abs(first).max()))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_narrow_types_stay_near(name: str, dtype: mx.Dtype) -> None:
    checkpoint = made(small(name, vocab_size=192, hidden_size=96), ("Q4_1", "Q8_0"))
    expected = torch_logits(checkpoint, STEPS[:1])
    stage = load(checkpoint, whole(checkpoint.spec), dtype=dtype)
    wide = load(checkpoint, whole(checkpoint.spec))
    assert error(run([whole(checkpoint.spec)], [wide], STEPS[:1]), expected) < 2e-4
    assert stage.kv_bytes * 2 == wide.kv_bytes
    assert stage.weights_bytes < wide.weights_bytes
    found = run([whole(checkpoint.spec)], [stage], STEPS[:1])
    assert error(found, expected) < (0.05 if dtype == mx.float16 else 0.4)


def test_quantised_weights_stay_packed_and_add_up_over_ranks() -> None:
    spec = small("qwen2", hidden_size=256, intermediate_size=512, head_dim=32)
    kinds = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K")
    checkpoint = made(spec, kinds)
    expected = torch_logits(checkpoint)
    for tensor in ((1,), (1, 3)):
        ranks = shards(checkpoint, tensor)
        stages = [load(checkpoint, rank) for rank in ranks]
        assert error(run(ranks, stages), expected) < 2e-4
        dense = sum(4 * int(np.prod(checkpoint.tensor(n).shape)) for n in checkpoint.names())
        assert sum(stage.weights_bytes for stage in stages) < 0.5 * dense


def test_what_a_stage_says_of_itself() -> None:
    checkpoint = made(small("llama"))
    ranks = shards(checkpoint, (1, 1), (1, 1))
    stage = load(checkpoint, ranks[3])
    assert (stage.device, stage.kernels) == ("mlx:0", "mlx")
    assert (stage.spec, stage.shard) == (checkpoint.spec, ranks[3])
    assert (stage.context_tokens, stage.num_slots) == (CONTEXT, SLOTS)
    assert stage.kv_bytes == 3 * 2 * 2 * 16 * CONTEXT * SLOTS * 4  # layers, heads, pair, features
    assert stage.workspace_bytes > 0
    stage.close()


def test_a_lost_peer_ends_a_run() -> None:
    checkpoint = made(small("llama"))
    ranks = shards(checkpoint, (1, 1))
    stage, (mine, other) = load(checkpoint, ranks[0]), thread_groups(2)
    other.close()
    peers = Peers(mine, tuple(rank.vocab for rank in ranks), 20.0)
    with pytest.raises(PeerLost):
        stage.run(STEPS[0], None, peers)


def test_capped_attention() -> None:
    rng = np.random.default_rng(5)
    q, k, v = (
        rng.standard_normal((1, h, n, 8)).astype(np.float32) for h, n in ((4, 3), (2, 9), (2, 9))
    )
    found = np.array(
        attend(mx.array(q), mx.array(k), mx.array(v), scale=2.0, softcap=3.0, mask="causal")
    )
    scores = np.einsum("hle,hse->hls", q[0], k[0].repeat(2, 0)) * 2.0
    scores = np.tanh(scores / 3.0) * 3.0
    scores[:, np.arange(9)[None] > np.arange(6, 9)[:, None]] = -np.inf
    weights = np.exp(scores)
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(found[0], weights @ v[0].repeat(2, 0), atol=1e-5)


def test_a_cpu_computes_in_float32() -> None:
    if mx.default_device() == mx.Device(mx.cpu):
        assert activation_type(made(small("llama"), ("F16",))) == mx.float32
