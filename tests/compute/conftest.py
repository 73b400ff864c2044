"""What tests of compute share."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.compute.collective_ranks import Ranks

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember that a test failed: its processes are in no known state."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def all_ranks() -> Iterator[tuple[Ranks, Ranks]]:
    """Two pools: processes that have torch, and some that never import it."""
    from compute.shm_kernels import compile_all

    compile_all()  # once, here, rather than in every process at the same time
    pools = Ranks(), Ranks()
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def ranks(all_ranks: tuple[Ranks, Ranks], request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Processes for groups; importing torch in them is what costs, so all tests share them."""
    yield all_ranks[0]
    if request.node.stash.get(FAILED, False):
        all_ranks[0].close()  # no other test shall meet a stopped or confused process


@pytest.fixture
def light_ranks(all_ranks: tuple[Ranks, Ranks], request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Processes that never import torch, to be killed in numbers."""
    yield all_ranks[1]
    if request.node.stash.get(FAILED, False):
        all_ranks[1].close()


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of every family with transformers' logits, see ``tests.compute.families``."""
    from tests.compute.families import make

    return make(tmp_path_factory.mktemp("families"))
