"""Fixtures of the control plane's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.control.file_server import FileServer


@pytest.fixture
def server() -> Iterator[FileServer]:
    """A real HTTP server on loopback."""
    with FileServer() as made:
        yield made
