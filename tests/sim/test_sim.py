"""Two thousand clusters under fire, and the rules' mutants: the simulator has to see them."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest

from tests.sim.replay import run_seed

SEEDS = 2000
CHUNK = 50

pytestmark = pytest.mark.slow


def run_chunk(first: int) -> tuple[Counter[str], str]:
    """Run some seeds: what was counted, and the first failure as text."""
    counted: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        try:
            counted.update(run_seed(seed))
        except Exception as exc:  # noqa: BLE001 - it goes to the test's process as text
            return counted, "\n".join([f"{type(exc).__name__}: {exc}", *exc.__notes__])
    return counted, ""


@pytest.mark.timeout(400)
def test_two_thousand_clusters_under_fire() -> None:
    total: Counter[str] = Counter()
    workers = min(2, os.cpu_count() or 1)
    # Not forked: the test process has threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for done in as_completed([pool.submit(run_chunk, n) for n in range(0, SEEDS, CHUNK)]):
            counted, failed = done.result()
            if failed:
                pool.shutdown(cancel_futures=True)
                pytest.fail(failed, pytrace=False)
            total.update(counted)
    # The scenarios do what they are for: leaders fall, wishes are committed, instances start.
    assert total["won"] > SEEDS
    assert total["committed"] > SEEDS
    assert total["obeyed"] > SEEDS


def test_a_seed_means_the_same_every_time() -> None:
    assert run_seed(7) == run_seed(7)
