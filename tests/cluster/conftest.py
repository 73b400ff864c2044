"""Live nodes: one shared by tests that leave it as it was, fresh ones for those that do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from control.errors import DownloadFailed
from control.model_store import ModelStore
from models.card import load_cards
from tests.cluster.live_node import LiveNode, free_tcp_port

MODEL = "smollm2-135m-instruct"
CACHE = Path.home() / ".cache" / "phalanx-tests"
MakeNode = Callable[..., LiveNode]


@pytest.fixture(scope="session")
def model_file() -> Path:
    """The default model's file, fetched once for all tests."""
    return asyncio.run(_fetch(CACHE / "store"))


@pytest.fixture(scope="session")
def kernel_cache() -> Path:
    """Where compiled code is kept for all tests."""
    return CACHE / "kernels"


@pytest.fixture(scope="session")
def models_config(
    model_file: Path, kernel_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A configuration that finds the default model's file."""
    config = tmp_path_factory.mktemp("config") / "config.yaml"
    config.write_text(
        f"models:\n  dir: {CACHE / 'store'}\n"
        f"engine:\n  slots: 4\n  threads: 1\n  kernel_cache: {kernel_cache}\n"
    )
    return config


async def _fetch(store: Path) -> Path:
    try:
        return await ModelStore(store, load_cards()).ensure(MODEL)
    except DownloadFailed as exc:
        pytest.skip(f"the default model cannot be fetched: {exc}")


@pytest.fixture(scope="session")
def shared_node(
    models_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveNode]:
    """A node with the default model; tests must leave it serving."""
    node = LiveNode(tmp_path_factory.mktemp("node"), "shared@127.0.0.1", free_tcp_port())
    try:
        yield node.start("--config", str(models_config))
    finally:
        status = node.stop()
    assert status == 0, "\n".join(node.lines)
    assert not node.port_pids()


@pytest.fixture
def make_node(models_config: Path, tmp_path: Path) -> Iterator[MakeNode]:
    """Makes nodes that are stopped after the test, whatever it did to them."""
    made: list[LiveNode] = []

    def make(*args: str, expect_ready: bool = True, config: Path | None = None) -> LiveNode:
        number = len(made) + 1
        home = tmp_path / f"home{number}"
        node = LiveNode(home, f"node{number}@127.0.0.1", free_tcp_port())
        made.append(node)
        node.start("--config", str(config or models_config), *args, expect_ready=expect_ready)
        return node

    yield make
    for node in made:
        node.stop()
        assert not node.port_pids()
