"""Real ranks of the real models: memory while loading, and the estimate beside the measured."""

from __future__ import annotations

import asyncio
import sys

import pytest

from compute.bench_memory import RankMemory, Setting, measure, table
from tests.models.default_model import GEMMA3, SMOLLM2, model_path

MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("model", "tensor", "pipeline"), [(SMOLLM2, 3, 1), (GEMMA3, 1, 3)])
def test_ranks_stay_small_while_loading_and_take_what_was_estimated(
    model: str, tensor: int, pipeline: int
) -> None:
    setting = Setting(
        path=str(model_path(model)),
        tensor=tensor,
        pipeline=pipeline,
        context_tokens=192,
        num_slots=2,
    )
    ranks = asyncio.run(measure(setting))
    assert [rank.rank for rank in ranks] == list(range(tensor * pipeline))
    for rank in ranks:
        assert rank.peak_ratio <= 1.3, table(ranks)
        assert 0.9 <= rank.estimate_ratio <= 1.1, table(ranks)
        assert 0.85 <= rank.model_ratio <= 1.15, table(ranks)  # what is alike in all left out
        assert rank.loading <= 1.1 * rank.estimate, table(ranks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="NoSuchModel"):
        asyncio.run(measure(Setting(path="/no/such/file.gguf")))


def test_ratios_and_table() -> None:
    rank = RankMemory(
        rank=1,
        slice_in_file=90 * MIB,
        slice_in_memory=100 * MIB,
        before=150 * MIB,
        reading=260 * MIB,
        loading=265 * MIB,
        loaded=255 * MIB,
        full=300 * MIB,
        idle_estimate=160 * MIB,
        estimate=310 * MIB,
    )
    assert rank.peak_ratio == pytest.approx(1.1)
    assert rank.estimate_ratio == pytest.approx(310 / 300)
    assert rank.model_ratio == pytest.approx(1.0)
    head, _, line = table([rank]).splitlines()
    assert head.split("|")[3].strip() == "slice_in_memory"
    assert line.startswith("| 1 | 90.0 | 100.0 | 150.0 | 260.0 |")
