"""The compiled stage over meshes: ranks as threads, against one rank, bit by bit where promised.

And every family that it runs over every mesh, against transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from compute.collectives import Group
from compute.cpu.engine import CpuStage
from compute.cpu.weights import is_supported
from compute.errors import PeerLost
from compute.stage import Peers, Row
from models.checkpoint import Checkpoint, open_checkpoint
from models.footprint import footprint
from models.mesh import grid, mesh, units_of
from models.plans import slices_of
from models.sharding import RankShard
from tests.compute import families
from tests.compute.families import FAMILIES, Shape, shapes_of
from tests.compute.thread_group import ThreadGroup, thread_groups, together
from tests.models.specs import small
from tests.models.tiny import llama_tensors, write_gguf

Floats = npt.NDArray[np.float32]
Step = Sequence[Row]
CONTEXT = 96
STEPS: tuple[Step, ...] = (
    (Row(0, tuple(range(1, 71)), 0, want_logits=False), Row(1, (5, 9), 0)),
    (Row(0, (7,), 70), Row(1, (11,), 2)),
    (Row(1, (3, 4, 5), 3, want_logits=False),),
    (Row(1, (6,), 6), Row(0, (8,), 71)),
)
SIZES: dict[str, dict[str, Any]] = {
    "smollm": {"layers": 4, "hidden": 144, "heads": 9, "kv_heads": 3, "ffn": 160, "kind": "F32"},
    "quantised": {"layers": 2, "hidden": 288, "heads": 9, "kv_heads": 3, "ffn": 288},
    "one_kv_head": {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 1, "ffn": 72, "kind": "F32"},
    "bias": {"layers": 3, "hidden": 80, "heads": 5, "kv_heads": 5, "ffn": 40, "bias": True},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make(folder / f"{name}.gguf", **sizes) for name, sizes in SIZES.items()}


def make(path: Path, **sizes: Any) -> Checkpoint:
    """A random llama with tied embeddings, or with an output layer of its own if it has biases."""
    sizes = {"kind": "Q4_1" if sizes["hidden"] % 32 == 0 else "F32", **sizes}
    tensors = llama_tensors(**sizes)
    counts = {
        "attention.head_count": sizes["heads"],
        "attention.head_count_kv": sizes["kv_heads"],
    }
    if sizes.get("bias"):
        tensors["output.weight"] = (tensors["token_embd.weight"][0][::-1].copy(), "F32")
    return open_checkpoint(write_gguf(path, tensors, metadata=counts))


def shards(
    checkpoint: Checkpoint,
    tensor: Sequence[float],
    pipeline: Sequence[float] = (1,),
    *,
    split_embedding: bool = True,
) -> tuple[RankShard, ...]:
    return mesh(
        checkpoint.spec,
        grid(tensor, pipeline),
        units=units_of(checkpoint.spec, checkpoint),
        split_embedding=split_embedding,
    )


def load(
    checkpoint: Checkpoint,
    shard: RankShard,
    *,
    threads: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CpuStage:
    return CpuStage.load(
        checkpoint,
        shard,
        context_tokens=CONTEXT,
        num_slots=2,
        threads=threads,
        on_progress=on_progress,
    )


def run(
    checkpoint: Checkpoint,
    ranks: Sequence[RankShard],
    *,
    threads: int = 1,
    steps: Sequence[Step] = STEPS,
) -> list[list[Floats]]:
    """What every tensor rank of the last stage returns, a list of steps each."""
    world = ranks[0].tensor.world_size
    stages = [ranks[start : start + world] for start in range(0, len(ranks), world)]
    incoming: list[Floats | None] = [None] * len(steps)
    for stage in stages:
        groups: list[Group] = thread_groups(world) if world > 1 else []
        calls = [
            partial(_all_steps, checkpoint, stage, rank, groups, threads, steps, incoming)
            for rank in range(world)
        ]
        found = together(calls, groups)
        incoming = list(found[0])
    return found


def _all_steps(
    checkpoint: Checkpoint,
    stage: Sequence[RankShard],
    rank: int,
    groups: Sequence[Group],
    threads: int,
    steps: Sequence[Step],
    incoming: Sequence[Floats | None],
) -> list[Floats]:
    vocab = tuple(shard.vocab for shard in stage)
    peers = Peers(groups[rank], vocab, timeout_s=30.0) if groups else None
    engine = load(checkpoint, stage[rank], threads=threads)
    try:
        return [engine.run(rows, x, peers) for rows, x in zip(steps, incoming, strict=True)]
    finally:
        engine.close()


def error(found: Sequence[Floats], expected: Sequence[Floats]) -> float:
    """Largest difference beside the largest logit."""
    pairs = zip(found, expected, strict=True)
    worst = max(float(np.abs(a - b).max()) for a, b in pairs if a.size)
    return worst / max(float(np.abs(b).max()) for b in expected if b.size)


def same(a: Sequence[Floats], b: Sequence[Floats]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("pipeline", [(1, 1), (3, 1), (1, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_pipeline_gives_the_bits_of_one_rank(
    checkpoints: dict[str, Checkpoint], pipeline: tuple[int, ...], threads: int
) -> None:
    checkpoint = checkpoints["smollm"]
    (alone,) = run(checkpoint, shards(checkpoint, (1,)))
    (found,) = run(checkpoint, shards(checkpoint, (1,), pipeline), threads=threads)
    assert same(found, alone)
    assert [len(logits) for logits in found] == [1, 2, 0, 2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [
        ("smollm", (1, 1), (1,)),  # 2 KV heads and 1
        ("smollm", (1, 3), (1,)),
        ("smollm", (1, 1, 1), (1,)),
        ("smollm", (2, 1, 1, 1), (1,)),  # one KV head on two ranks
        ("smollm", (1, 1), (1, 1)),
        ("smollm", (2, 1), (1, 2, 1)),
        ("quantised", (1, 1), (1,)),
        ("quantised", (5, 1, 1), (1,)),
        ("one_kv_head", (1, 1), (1,)),
        ("one_kv_head", (1, 2, 1), (1,)),
        ("one_kv_head", (1, 1, 1, 1), (1,)),  # one query head each, 72 inner features
        ("one_kv_head", (1, 1), (1, 1)),
        ("bias", (1, 1), (1,)),
        ("bias", (1, 1, 1, 1), (1,)),
    ],
)
def test_tensor_ranks_agree_with_one_rank_and_with_each_other(
    checkpoints: dict[str, Checkpoint],
    name: str,
    tensor: tuple[int, ...],
    pipeline: tuple[int, ...],
) -> None:
    checkpoint = checkpoints[name]
    (alone,) = run(checkpoint, shards(checkpoint, (1,)))
    ranks = shards(checkpoint, tensor, pipeline)
    found = run(checkpoint, ranks)
    assert error(found[0], alone) < 2e-4
    for other in found[1:]:
        assert same(other, found[0])
    assert same(run(checkpoint, ranks, threads=2)[0], found[0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_embedding_that_every_rank_has_is_not_summed(
    checkpoints: dict[str, Checkpoint],
) -> None:
    checkpoint = checkpoints["smollm"]
    (alone,) = run(checkpoint, shards(checkpoint, (1,)))
    ranks = shards(checkpoint, (2, 1), split_embedding=False)
    assert checkpoint.spec.tied_embeddings
    assert len(ranks[1].vocab) < len(ranks[1].embedding) == checkpoint.spec.vocab_size
    found = run(checkpoint, ranks)
    assert error(found[0], alone) < 2e-4
    assert same(found[0], found[1])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_long_prompt_in_company_is_the_same_bits(checkpoints: dict[str, Checkpoint]) -> None:
    """Tensor ranks too: a row's bits depend on nothing else in the step."""
    checkpoint = checkpoints["smollm"]
    ranks = shards(checkpoint, (2, 1))
    ids = tuple(range(3, 80))
    alone = run(checkpoint, ranks, steps=[(Row(0, ids, 0),)])[0]
    company = (Row(1, tuple(range(40)), 0), Row(0, ids[:50], 0, want_logits=False))
    chunked = run(checkpoint, ranks, steps=[company, (Row(0, ids[50:], 50), Row(1, (4,), 40))])
    assert np.array_equal(chunked[0][1][0], alone[0][0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_reads_its_slice_and_says_what_it_takes(
    checkpoints: dict[str, Checkpoint],
) -> None:
    for name, tensor, pipeline in (
        ("smollm", (2, 1), (1, 1)),
        ("one_kv_head", (1, 1, 1), (1,)),
        ("bias", (1, 1), (1, 1, 1)),
    ):
        checkpoint = checkpoints[name]
        for shard in shards(checkpoint, tensor, pipeline):
            seen: list[tuple[int, int]] = []
            engine = load(checkpoint, shard, on_progress=lambda *now, seen=seen: seen.append(now))
            sizes = {
                part: int(np.prod([cut.stop - cut.start for cut in cuts]))
                for part, cuts in slices_of(checkpoint.spec, shard).items()
            }
            assert seen[0] == (0, 4 * sum(sizes.values()))
            assert seen[-1] == (seen[0][1], seen[0][1])
            assert seen == sorted(seen)
            told = footprint(
                checkpoint.spec,
                checkpoint,
                shard,
                kernels="compiled",
                device="cpu",
                context_tokens=CONTEXT,
                num_slots=2,
                threads=1,
            )
            assert engine.weights_bytes == told.weights_bytes
            assert engine.kv_bytes == told.kv_bytes
            assert 0 < engine.workspace_bytes <= told.workspace_bytes
            assert (engine.kernels, engine.device) == ("compiled", "cpu:0")
            engine.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quantised_slices_stay_quantised(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["quantised"]
    whole = load(checkpoint, shards(checkpoint, (1,))[0])
    parts = [load(checkpoint, shard) for shard in shards(checkpoint, (5, 1, 1))]
    total = sum(part.weights_bytes for part in parts)
    assert whole.weights_bytes <= total < whole.weights_bytes * 1.05
    for engine in (whole, *parts):
        engine.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_lost_peer_ends_the_step_and_leaves_no_thread_behind(
    checkpoints: dict[str, Checkpoint],
) -> None:
    checkpoint = checkpoints["smollm"]
    ranks = shards(checkpoint, (1, 1))
    engine = load(checkpoint, ranks[0], threads=3)
    group, other = thread_groups(2)
    other.close()
    peers = Peers(group, tuple(shard.vocab for shard in ranks), timeout_s=5.0)
    with pytest.raises(PeerLost):
        engine.run([Row(0, (1,), 0)], None, peers)
    helpers = list(engine._crew._helpers)
    engine.close()
    assert not any(helper.is_alive() for helper in helpers)


def test_sums_are_two_a_layer_and_one_for_the_embedding(
    checkpoints: dict[str, Checkpoint],
) -> None:
    checkpoint = checkpoints["one_kv_head"]
    ranks = shards(checkpoint, (1, 1))
    groups = thread_groups(2)
    vocab = tuple(shard.vocab for shard in ranks)

    def work(rank: int) -> None:
        engine = load(checkpoint, ranks[rank])
        engine.run([Row(0, (1, 2), 0)], None, Peers(groups[rank], vocab, timeout_s=30.0))
        engine.close()

    together([partial(work, rank) for rank in range(2)], groups)
    assert isinstance(groups[0], ThreadGroup)
    assert groups[0].num_sums == 1 + 2 * checkpoint.spec.num_layers


def test_what_the_kernels_run_is_said_beforehand() -> None:
    assert is_supported(small("gemma3"))
    assert is_supported(small("mixtral"))
    assert not is_supported(small("deepseek_v3"))
    assert not is_supported(small("llama", head_dim=24))


COMPILED = [name for name in FAMILIES if not name.startswith("deepseek")]


def on_cpu(checkpoint: Checkpoint, shard: RankShard) -> CpuStage:
    assert is_supported(checkpoint.spec)
    return CpuStage.load(
        checkpoint,
        shard,
        context_tokens=families.CONTEXT_TOKENS,
        num_slots=families.NUM_SLOTS,
        threads=1,
        on_progress=lambda done, total: None,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in COMPILED for shape in shapes_of(name)], ids=str
)
def test_logits_are_those_of_transformers_over_every_mesh(
    family_folders: dict[str, Path], name: str, shape: Shape
) -> None:
    assert families.error(family_folders[name], shape, on_cpu) < 2e-4
