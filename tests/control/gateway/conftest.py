"""One gateway for each test file; its backend is as new for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.control.gateway.fake_backend import FakeBackend
from tests.control.gateway.live import Live, serve


@pytest.fixture(scope="module")
def running() -> Iterator[Live]:
    with serve(FakeBackend()) as live:
        yield live


@pytest.fixture
def live(running: Live) -> Live:
    running.backend.reset()
    return running
