"""The default model on MLX, in full and on two tensor ranks: the CPU engine's greedy tokens."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from compute.stage import Peers, Row, load_stage
from models.checkpoint import Checkpoint, open_checkpoint
from models.mesh import grid, mesh, units_of, whole
from models.sharding import RankShard
from tests.compute.thread_group import thread_groups, together
from tests.models.default_model import default_model_path

pytest.importorskip("mlx.core")

NUM_TOKENS = 16
FEW = 4  # on two ranks: a CPU is slow with MLX
PROMPT = "The capital of France is"


def greedy(
    checkpoint: Checkpoint, ranks: tuple[RankShard, ...], device: str, count: int = NUM_TOKENS
) -> list[int]:
    """The likeliest tokens after the prompt."""
    stages = [
        load_stage(
            checkpoint,
            shard,
            context_tokens=64,
            num_slots=1,
            threads=1,
            device=device,
            on_progress=lambda done, total: None,
        )
        for shard in ranks
    ]
    groups = thread_groups(len(ranks))
    vocab = tuple(shard.vocab for shard in ranks)
    peers = [Peers(group, vocab, 60.0) if len(ranks) > 1 else None for group in groups]
    ids = tuple(checkpoint.tokenizer().encode(PROMPT))
    tokens: list[int] = []
    start = 0
    for _ in range(count):
        row = Row(0, ids, start)
        logits = together(
            [
                partial(stage.run, [row], None, end)
                for stage, end in zip(stages, peers, strict=True)
            ],
            groups,
        )
        start, ids = start + len(ids), (int(np.argmax(logits[0][0])),)
        tokens += ids
    for stage in stages:
        stage.close()
    return tokens


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_cpu_engine() -> None:
    checkpoint = open_checkpoint(default_model_path())
    spec = checkpoint.spec
    expected = greedy(checkpoint, (whole(spec),), "cpu")
    assert greedy(checkpoint, (whole(spec),), "mlx") == expected
    two = mesh(spec, grid((2, 1)), units=units_of(spec, checkpoint), split_embedding=True)
    assert greedy(checkpoint, two, "mlx", FEW) == expected[:FEW]
