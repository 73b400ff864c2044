"""Experts in the compiled kernels: the choice, its order, its bits in any company, and its sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.cpu import routing
from compute.cpu import tables as t
from compute.cpu.engine import CpuStage
from compute.cpu.jit import entry
from compute.cpu.layout import padded
from compute.cpu.weights import describe_experts
from compute.stage import Row
from compute.torch.engine import TorchStage
from compute.torch.routing import route
from models.checkpoint import Checkpoint, open_checkpoint
from models.mesh import grid, mesh, units_of, whole
from models.plans import PLANS, SCORE_BIAS, SHARED_EXPERTS
from models.sharding import RankShard
from models.spec import ExpertSpec, ModelSpec
from tests.compute.families import Mesh, Shape, cut
from tests.compute.made import made
from tests.compute.routing_cases import CASES, Case
from tests.models.specs import small
from tests.models.test_families import ATTENTION, COUNTS, gguf_tensors, moe_shapes
from tests.models.tiny import write_gguf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first of them compiles
Floats = npt.NDArray[np.float32]
ACROSS: Literal["across"] = "across"


@entry
def choose_rows(
    dims: Any, reals: Any, logits: Any, rows: Any, bias: Any, chosen: Any, factors: Any, room: Any
) -> None:
    for row in range(rows):
        at = row * dims[t.NUM_ACTIVE]
        routing.choose(
            dims, reals, logits, rows, row, bias, chosen + at * 8, factors + at * 4, room
        )


def chosen(
    logits: Floats, experts: ExpertSpec, bias: Floats | None = None
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Factors and experts of some rows, as the kernels choose them."""
    rows, count = logits.shape
    wide = np.zeros((rows, padded(count)), dtype=np.float32)
    wide[:, :count] = logits
    grouped = np.ascontiguousarray(wide.reshape(rows, -1, 32).transpose(1, 0, 2))
    dims, reals = np.zeros(t.NUM_DIMS, dtype=np.int64), np.zeros(t.NUM_REALS, dtype=np.float32)
    describe_experts(dims, reals, experts, range(count))
    room = np.empty(routing.SCRATCH_FLOATS * padded(count), dtype=np.float32)
    numbers = np.full((rows, experts.num_active), -1, dtype=np.int64)
    factors = np.empty((rows, experts.num_active), dtype=np.float32)
    added = np.zeros(padded(count), dtype=np.float32)
    if bias is not None:
        added[:count] = bias
    choose_rows(
        dims,
        reals,
        grouped.ctypes.data,
        rows,
        0 if bias is None else added.ctypes.data,
        numbers.ctypes.data,
        factors.ctypes.data,
        room.ctypes.data,
    )
    return factors, numbers


@st.composite
def rules(draw: st.DrawFn) -> ExpertSpec:
    groups, size = draw(st.sampled_from([(1, 8), (1, 37), (4, 2), (4, 16), (8, 32), (3, 1)]))
    active_groups = draw(st.integers(1, groups))
    return ExpertSpec(
        num_experts=groups * size,
        num_active=draw(st.integers(1, min(8, active_groups * size))),
        ffn_size=32,
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        score_bias=draw(st.booleans()),
        normalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        num_groups=groups,
        num_active_groups=active_groups,
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
    )


@settings(max_examples=150, deadline=None, derandomize=True)  # near ties may fall either way
@given(experts=rules(), seed=st.integers(0, 1000), spread=st.sampled_from([0.1, 1.0, 3.0]))
def test_the_choice_is_that_of_the_torch_engine(
    experts: ExpertSpec, seed: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal((5, experts.num_experts))).astype(np.float32)
    bias = None
    if experts.score_bias:
        bias = (0.1 * rng.standard_normal(experts.num_experts)).astype(np.float32)
    factors, numbers = chosen(logits, experts, bias)
    assert (np.diff(numbers, axis=1) > 0).all()
    weights, ids = route(
        torch.from_numpy(logits), experts, None if bias is None else torch.from_numpy(bias)
    )
    theirs = np.zeros_like(logits)
    np.put_along_axis(theirs, ids.numpy(), weights.numpy(), axis=1)
    mine = np.zeros_like(logits)
    np.put_along_axis(mine, numbers, factors, axis=1)
    np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=1e-12)
    again, same = chosen(logits[2:3], experts, bias)
    assert np.array_equal(again[0], factors[2])
    assert np.array_equal(same[0], numbers[2])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cases_of_all_engines(case: Case) -> None:
    factors, numbers = chosen(case.logits, case.experts, case.bias_array)
    case.check(numbers, factors)


def test_of_equal_scores_the_first_are_chosen_and_nan_chooses_something() -> None:
    experts = ExpertSpec(num_experts=40, num_active=3, ffn_size=32)
    logits = np.zeros((2, 40), dtype=np.float32)
    logits[1] = np.nan
    factors, numbers = chosen(logits, experts)
    assert numbers.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert np.allclose(factors[0], 1 / 3)


def spec_of(**fields: Any) -> ModelSpec:
    """A small Qwen3 MoE with another rule of choice."""
    spec = small("qwen3_moe", vocab_size=131, num_experts_per_tok=2, mlp_only_layers=[])
    assert spec.experts is not None
    return dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, **fields))


def load(checkpoint: Checkpoint, shard: RankShard, threads: int = 1) -> CpuStage:
    return CpuStage.load(
        checkpoint,
        shard,
        context_tokens=96,
        num_slots=4,
        threads=threads,
        on_progress=lambda done, total: None,
    )


def by_torch(checkpoint: Checkpoint, rows: list[Row]) -> Floats:
    stage = TorchStage.load(
        checkpoint,
        whole(checkpoint.spec),
        context_tokens=96,
        num_slots=4,
        threads=1,
        device="cpu",
        on_progress=lambda done, total: None,
    )
    logits: Floats = stage.run(rows, None, None)
    stage.close()
    return logits


ROWS = [Row(0, tuple(range(2, 72)), 0), Row(3, (9, 8, 7), 0), Row(1, (5,), 0)]


@pytest.fixture
def shared_experts_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No family with ordinary attention has these weights yet; the kernels take them as data."""
    plans: Any = PLANS
    monkeypatch.setitem(plans, "qwen3_moe", {**PLANS["qwen3_moe"], **SHARED_EXPERTS, **SCORE_BIAS})


@pytest.mark.usefixtures("shared_experts_planned")
@pytest.mark.parametrize(
    "fields",
    [
        {"normalize": False, "scale": 1.7},
        {"num_shared": 2, "dense_layers": (0, 3)},
        {"scoring": "sigmoid", "score_bias": True, "num_groups": 4, "num_active_groups": 2},
        {
            "num_shared": 1,
            "num_groups": 2,
            "num_active_groups": 1,
            "group_score": "top2_sum",
            "num_active": 3,
        },
    ],
)
def test_every_rule_gives_the_logits_of_the_torch_engine(fields: dict[str, Any]) -> None:
    checkpoint = made(spec_of(**fields))
    expected = by_torch(checkpoint, ROWS)
    stage = load(checkpoint, whole(checkpoint.spec))
    found = stage.run(ROWS, None, None)
    stage.close()
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def mixture() -> Iterator[tuple[Checkpoint, CpuStage]]:
    checkpoint = made(spec_of(num_active=3, ffn_size=96), kinds=("Q4_1", "Q8_0", "F32"))
    stage = load(checkpoint, whole(checkpoint.spec), threads=2)
    yield checkpoint, stage
    stage.close()


def test_a_row_is_the_same_bits_in_any_company_chunking_and_thread_count(
    mixture: tuple[Checkpoint, CpuStage],
) -> None:
    checkpoint, stage = mixture
    (alone,) = stage.run(ROWS[:1], None, None)
    assert np.array_equal(stage.run(ROWS, None, None)[0], alone)
    ids = ROWS[0].ids
    stage.run([Row(2, ids[:37], 0, want_logits=False), *ROWS[1:]], None, None)
    for at in range(37, len(ids)):
        found = stage.run([Row(3, (at,), at), Row(2, ids[at : at + 1], at)], None, None)
    assert np.array_equal(found[1], alone)
    single = load(checkpoint, stage.shard)
    assert np.array_equal(single.run(ROWS[:1], None, None)[0], alone)
    single.close()


@pytest.mark.parametrize("shape", [Shape((2, 1)), Shape((2, 1), (1,), ACROSS)], ids=str)
def test_experts_stay_quantised_and_whole_experts_are_read_by_one_rank(
    family_folders: dict[str, Path], shape: Shape
) -> None:
    with cut(family_folders["qwen3_moe"], shape, load) as ranks:
        sizes = [rank.weights_bytes for rank in ranks.stages[0]]
    checkpoint = open_checkpoint(family_folders["qwen3_moe"])
    stage = load(checkpoint, whole(checkpoint.spec))
    assert max(sizes) < 0.85 * stage.weights_bytes
    stage.close()
    quantised = made(spec_of(ffn_size=128), kinds=("Q4_1",))
    small_stage = load(quantised, whole(quantised.spec))
    plain = load(made(spec_of(ffn_size=128)), whole(quantised.spec))
    assert small_stage.weights_bytes < 0.2 * plain.weights_bytes
    small_stage.close()
    plain.close()


def over(checkpoint: Checkpoint, shape: Shape) -> Mesh:
    """A model over a mesh, all ranks in this process."""
    shards = mesh(
        checkpoint.spec,
        grid(shape.tensor, shape.pipeline),
        units=units_of(checkpoint.spec, checkpoint),
        experts=shape.experts,
        split_embedding=True,
    )
    world = len(shape.tensor)
    ranks = [load(checkpoint, shard) for shard in shards]
    return Mesh([list(ranks[at : at + world]) for at in range(0, len(ranks), world)])


def test_a_pipeline_gives_the_bits_of_one_rank(mixture: tuple[Checkpoint, CpuStage]) -> None:
    checkpoint, stage = mixture
    expected = stage.run(ROWS, None, None)
    for pipeline in ((1, 1), (1, 3, 1)):
        stages = over(checkpoint, Shape((1,), pipeline))
        assert np.array_equal(stages.run(ROWS), expected)
        stages.close()


@pytest.mark.parametrize("experts", ["inside", "across"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_experts_of_gguf_files_over_ranks(
    tmp_path: Path, arch: str, kind: str, experts: Literal["inside", "across"]
) -> None:
    attention = dict(ATTENTION)
    if arch == "qwen3moe":
        attention |= {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
    tensors = gguf_tensors(moe_shapes(attention), kind)
    path = write_gguf(
        tmp_path / "m.gguf",
        tensors,
        arch=arch,
        metadata={**COUNTS, "expert_feed_forward_length": 96},
    )
    checkpoint = open_checkpoint(path)
    expected = by_torch(checkpoint, ROWS)
    ranks = over(checkpoint, Shape((2, 1), (1,), experts))
    found = ranks.run(ROWS)
    held = sum(rank.weights_bytes for rank in ranks.stages[0])
    ranks.close()
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    alone = load(checkpoint, whole(checkpoint.spec))
    assert held < 1.2 * alone.weights_bytes  # norms and router twice; no block is unpacked
    alone.close()


def test_many_rows_on_many_threads_agree_with_one(mixture: tuple[Checkpoint, CpuStage]) -> None:
    """Threads that come late to a phase must not take work of another layer's choices."""
    checkpoint, stage = mixture
    crowd = load(checkpoint, stage.shard, threads=4)
    rng = np.random.default_rng(0)
    for turn in range(20):
        rows = [
            Row(slot, tuple(int(i) for i in rng.integers(0, 131, 1 + 9 * (turn % 3))), 0)
            for slot in range(4)
        ]
        assert np.array_equal(crowd.run(rows, None, None), stage.run(rows, None, None))
    crowd.close()
