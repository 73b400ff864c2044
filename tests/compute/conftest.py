"""What tests of compute share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compute.collective_ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for groups; importing torch in them is what costs, so all tests share them."""
    from compute.shm_kernels import compile_all

    compile_all()  # once, here, rather than in every process at the same time
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def light_ranks(ranks: Ranks) -> Iterator[Ranks]:
    """Processes that never import torch, to be killed in numbers."""
    pool = Ranks()
    yield pool
    pool.close()
