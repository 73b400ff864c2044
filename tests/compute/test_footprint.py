"""What models.footprint foretells of a rank, beside what the loaded stage says of itself."""

from __future__ import annotations

import pytest

from compute.stage import MAX_POSITIONS, Stage, load_stage
from compute.torch import latent
from compute.torch.engine import TorchStage
from models import footprint as figures
from models.checkpoint import Checkpoint, open_checkpoint
from models.footprint import Kernels, footprint, kernels_for
from models.mesh import mesh, units_of
from models.sharding import RankShard
from tests.compute.made import made
from tests.models.default_model import GEMMA3, SMOLLM2, model_path
from tests.models.specs import FAMILIES, small

CONTEXT_TOKENS, NUM_SLOTS, THREADS = 200, 3, 2


def shard_of(checkpoint: Checkpoint, shares: list[list[float]], rank: int) -> RankShard:
    spec = checkpoint.spec
    return mesh(spec, shares, units=units_of(spec, checkpoint), split_embedding=True)[rank]


def load(checkpoint: Checkpoint, shard: RankShard, kernels: Kernels) -> Stage:
    if kernels == "torch":
        return TorchStage.load(
            checkpoint,
            shard,
            context_tokens=CONTEXT_TOKENS,
            num_slots=NUM_SLOTS,
            threads=THREADS,
            device="cpu",
            on_progress=lambda done, total: None,
        )
    return load_stage(
        checkpoint,
        shard,
        context_tokens=CONTEXT_TOKENS,
        num_slots=NUM_SLOTS,
        threads=THREADS,
        device="mlx" if kernels == "mlx" else "cpu",
        on_progress=lambda done, total: None,
    )


def compare(checkpoint: Checkpoint, shard: RankShard, kernels: Kernels) -> None:
    stage = load(checkpoint, shard, kernels)
    try:
        assert stage.kernels == kernels
        said = footprint(
            checkpoint.spec,
            checkpoint,
            shard,
            kernels=kernels,
            device="mlx-cpu" if kernels == "mlx" else "cpu",
            context_tokens=CONTEXT_TOKENS,
            num_slots=NUM_SLOTS,
            threads=THREADS,
        )
        assert said.weights_bytes == pytest.approx(stage.weights_bytes, rel=0.002)
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
    compare(checkpoint, shard_of(checkpoint, shares, rank), "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["compiled", "torch", "mlx"])
@pytest.mark.parametrize("kinds", [("F32",), ("BF16",), ("Q4_0", "Q5_1", "Q8_0")])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_engine_takes_what_was_foretold(
    family: str, kinds: tuple[str, ...], kernels: Kernels
) -> None:
    spec = small(family)
    if kernels != "torch" and kernels_for(spec, {"mlx": "mlx"}.get(kernels, "cpu")) != kernels:
        pytest.skip(f"no {kernels} kernels for {family}")
    checkpoint = made(spec, kinds)
    for shares, rank in (([[1.0]], 0), ([[2.0, 1.0]], 1), ([[1.0], [1.0]], 1)):
        compare(checkpoint, shard_of(checkpoint, shares, rank), kernels)


def test_both_planes_mean_the_same_step() -> None:
    assert figures.MAX_POSITIONS == MAX_POSITIONS
    assert figures.LATENT_SCORES == latent.SCORES
