"""``/openapi.json`` says what may be asked: nothing that it allows or forbids makes a 5xx."""

from __future__ import annotations

import pytest

from tests.control.gateway.api_fuzz import fuzz
from tests.control.gateway.fake_backend import MODEL, FakeBackend, FakeControl
from tests.control.gateway.live import serve


@pytest.mark.slow
def test_no_request_makes_the_server_fail() -> None:
    with serve(FakeBackend(), control=FakeControl()) as live:
        found = fuzz(live.url, examples=2, model=MODEL)
    assert not found.failures
    assert len(found.codes) > 25
    codes = {code for seen in found.codes.values() for code in seen}
    assert {200, 400, 404} <= codes
