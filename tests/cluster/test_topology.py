"""Two real nodes measure their link and know their speeds, and each tells of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control.cost_model import Speed
from control.device_speed import SpeedFile, devices_of, kernels_version, speeds_from
from control.machine import Limits, read_machine
from tests.cluster.live_node import LiveNode, free_tcp_port
from tests.cluster.test_join import share_cookie
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

KNOWN = {"a": Speed(1.25e10, 1e11), "b": Speed(3e10, 5e11)}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[LiveNode, LiveNode]]:
    """Both have been measured in a former life."""
    epmd_port = free_tcp_port()
    config = tmp_path / "config.yaml"
    config.write_text(f"network:\n  discovery: epmd\nnode:\n  epmd_port: {epmd_port}\n")
    made = [LiveNode(tmp_path / name, f"{name}@127.0.0.1", epmd_port) for name in KNOWN]
    what = devices_of(read_machine(Limits()))["cpu:0"]
    for node, speed in zip(made, KNOWN.values(), strict=True):
        share_cookie(node.home, "SECRETOFTHETEST")
        state = node.home / "state"
        state.mkdir(mode=0o700)
        SpeedFile(state / "speeds.json").write(kernels_version(), {what: speed})
    try:
        for node in made:
            node.begin("--config", str(config), "--no-model")
        for node in made:
            node.wait_ready(1)
        yield made[0], made[1]
    finally:
        for node in made:
            node.stop()


def data(node: LiveNode, command: str) -> Any:
    return json.loads(node.ctl(command, "--json").stdout)


def test_links_and_speeds_of_both_are_told_by_each(nodes: tuple[LiveNode, LiveNode]) -> None:
    a, b = nodes

    def links() -> Any:
        found = [link for link in data(b, "topology") if "to" in link]
        return found if len(found) == 2 else None

    for link in wait_until(links, 30.0, "links in both directions"):
        assert link["kind"] == "loopback"
        assert 0 < link["latency_s"] < 0.1
        assert link["bytes_per_s"] > 1e6
    drawn = a.ctl("topology").stdout
    assert "2 machines, 1 link" in drawn
    assert "└─ b@127.0.0.1  loopback" in drawn

    def speeds() -> Any:
        rows = data(a, "nodes")
        found = [(row["name"].partition("@")[0], speeds_from(row["speeds"])) for row in rows]
        return sorted(found) == [(name, {"cpu:0": speed}) for name, speed in KNOWN.items()]

    wait_until(speeds, 30.0, "speeds of both")
