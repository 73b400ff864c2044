"""Ranks that were given only the parts of a model that they need, with garbage in the holes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compute.cpu.engine import CpuStage
from compute.stage import Row, Stage, load_stage
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import PartsMissing
from models.mesh import grid, mesh
from models.needed import needed_ranges
from models.part_note import PART_NOTE
from models.sharding import RankShard
from tests.compute.families import Load, Shape, cut, on_torch
from tests.models.test_needed import only
from tests.models.tiny import llama_tensors, write_gguf

SHAPES = [Shape((2, 1)), Shape((1,), (1, 1)), Shape((1, 1), (1, 1))]
ROWS = [Row(slot=0, ids=(5, 99, 17, 3), start=0), Row(slot=2, ids=(64, 1), start=0)]


def on_cpu(checkpoint: Checkpoint, shard: RankShard) -> Stage:
    return CpuStage.load(
        checkpoint,
        shard,
        context_tokens=64,
        num_slots=4,
        threads=1,
        on_progress=lambda done, total: None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_1", "F32"])
@pytest.mark.parametrize("load", [on_cpu, on_torch])
def test_the_holes_of_a_part_are_never_read(load: Load, kind: str, tmp_path: Path) -> None:
    (made := tmp_path / "made").mkdir()
    path = write_gguf(made / "m.gguf", llama_tensors(kind=kind))

    def from_parts(checkpoint: Checkpoint, shard: RankShard) -> Stage:
        into = tmp_path / f"{shape} {shard.rank}"
        return load(open_checkpoint(only(path, needed_ranges(checkpoint, shard), into)), shard)

    for shape in SHAPES:
        with cut(path, shape, load) as whole, cut(path, shape, from_parts) as parts:
            expected = whole.run(ROWS)
            assert np.isfinite(expected).all()
            np.testing.assert_array_equal(parts.run(ROWS), expected)


def test_a_rank_whose_part_is_not_here_says_so(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_tensors())
    checkpoint = open_checkpoint(path)
    (tmp_path / PART_NOTE).write_text('{"fingerprint": "f", "have": {}}')
    with pytest.raises(PartsMissing):
        load_stage(
            checkpoint,
            mesh(checkpoint.spec, grid((1.0,)))[0],
            context_tokens=64,
            num_slots=1,
            threads=1,
            device="cpu",
            on_progress=lambda done, total: None,
        )
