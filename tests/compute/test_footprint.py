"""What models.footprint foretells of a rank, beside what the loaded stage says of itself."""

from __future__ import annotations

import pytest

from compute.stage import MAX_POSITIONS, load_stage
from models import footprint as figures
from models.checkpoint import Checkpoint, open_checkpoint
from models.footprint import Footprint, footprint, kernels_for
from models.mesh import mesh, units_of
from models.sharding import RankShard
from tests.models.default_model import GEMMA3, SMOLLM2, model_path

CONTEXT_TOKENS, NUM_SLOTS, THREADS = 300, 3, 2


def shard_of(checkpoint: Checkpoint, shares: list[list[float]], rank: int) -> RankShard:
    spec = checkpoint.spec
    units = units_of(spec, checkpoint)
    return mesh(spec, shares, units=units, split_embedding=True)[rank]


def foretold(checkpoint: Checkpoint, shard: RankShard, device: str) -> Footprint:
    return footprint(
        checkpoint.spec,
        checkpoint,
        shard,
        kernels=kernels_for(checkpoint.spec, device),
        device=device,
        context_tokens=CONTEXT_TOKENS,
        num_slots=NUM_SLOTS,
        threads=THREADS,
    )


def compare(checkpoint: Checkpoint, shard: RankShard, device: str) -> None:
    stage = load_stage(
        checkpoint,
        shard,
        context_tokens=CONTEXT_TOKENS,
        num_slots=NUM_SLOTS,
        threads=THREADS,
        device=device,
        on_progress=lambda done, total: None,
    )
    try:
        said = foretold(checkpoint, shard, device)
        assert stage.kernels == kernels_for(checkpoint.spec, device)
        assert said.weights_bytes == pytest.approx(stage.weights_bytes, rel=1e-3)
        assert said.kv_bytes == stage.kv_bytes
        assert said.workspace_bytes == pytest.approx(stage.workspace_bytes, rel=0.01)
    finally:
        stage.close()


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMOLLM2, GEMMA3])
@pytest.mark.parametrize(
    ("shares", "rank"),
    [
        ([[1]], 0),
        ([[2, 1]], 1),
        ([[1, 1, 1]], 1),
        ([[1], [1]], 0),
        ([[1], [1]], 1),
        ([[1, 1], [1, 1]], 3),
    ],
)
def test_compiled_kernels_take_what_was_foretold(
    model: str, shares: list[list[float]], rank: int
) -> None:
    checkpoint = open_checkpoint(model_path(model))
    compare(checkpoint, shard_of(checkpoint, shares, rank), "cpu")


def test_both_planes_mean_the_same_step() -> None:
    assert figures.MAX_POSITIONS == MAX_POSITIONS
