"""One model over several unequal machines, its files fetched once: real nodes in namespaces."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import netns
from tests.cluster.lab import FILE, MODEL, Box, Lab, Setup, lab
from tests.cluster.live_node import LiveNode
from tests.cluster.test_end_to_end import ask
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STORY = "Tell me a long story about a fox."
TOKENS = 16
LIMITS = {"10.77.0.1": 900, "10.77.0.2": 700, "10.77.0.3": 500, "10.77.0.4": 450}  # MB
SLOW = "phalanx@10.77.0.4"
LONG_CONTEXT = 7168  # its keys and values alone take 660 MB


@pytest.fixture(scope="module")
def made(
    model_file: Path, kernel_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """Four machines, each with less memory than the one before."""
    if why := netns.reason_for_none():
        pytest.skip(why)
    setups = [Setup(memory=f"{limit}MB") for limit in LIMITS.values()]
    with lab(tmp_path_factory.mktemp("lab"), model_file, kernel_cache, setups) as running:
        yield running


@pytest.fixture(scope="module")
def alone(shared_node: LiveNode) -> str:
    """What one rank on one machine answers, greedily."""
    return ask(shared_node, max_tokens=TOKENS, text=STORY)


def limit_bytes(node: str) -> int:
    return LIMITS[node.partition("@")[2]] * 10**6


def within_limits(ranks: list[dict[str, Any]], field: str) -> set[str]:
    """The machines of these ranks; none of them lends less than its ranks take."""
    taken: Counter[str] = Counter()
    for rank in ranks:
        taken[rank["node"]] += rank[field]
    for node, size in taken.items():
        assert size <= limit_bytes(node), taken
    return set(taken)


def test_four_machines_with_one_secret_are_one_cluster(made: Lab) -> None:
    leader = made.wait_joined()
    for box in made.boxes:
        rows = {row["name"]: row for row in box.node.get("nodes")}
        assert {n: row["memory"]["limit_bytes"] for n, row in rows.items()} == {
            name: limit_bytes(name) for name in rows
        }
    assert len({box.node.status()["epoch"] for box in made.boxes}) == 1
    table = made.boxes[0].node.ctl("status").stdout
    assert f"leader {leader}" in table


def test_links_are_measured_and_the_slow_one_is_known(made: Lab) -> None:
    def links() -> list[dict[str, Any]]:
        found = [link for link in made.boxes[1].node.get("topology") if "to" in link]
        return found if len(found) == 12 else []

    for link in wait_until(links, 30.0, "links of every machine to every other"):
        assert link["kind"] == "ethernet"
        assert (link["bytes_per_s"] < 40e6) == (link["from"] == SLOW), link


def test_a_model_is_fetched_once_and_then_from_a_peer(made: Lab) -> None:
    first, second = made.boxes[1], made.boxes[0]
    assert first.node.ctl("model", "pull", MODEL).returncode == 0
    pulled = first.node.ctl("model", "pull", MODEL, "--to", second.name)
    assert pulled.returncode == 0, pulled.stderr
    listed = json.loads(second.node.ctl("model", "list", "--json").stdout)
    assert {row["id"]: row["state"] for row in listed}[MODEL] == "local"
    assert made.fetched() == [FILE]


@pytest.mark.parametrize(
    ("strategy", "shape", "num_machines"),
    [
        ("tensor", {"tensor": 3}, 3),
        ("pipeline", {"pipeline": 3}, 3),
        ("mixed", {"tensor": 2, "pipeline": 2}, 4),
    ],
)
def test_every_shape_over_machines_gives_the_answer_of_one(
    made: Lab, alone: str, strategy: str, shape: dict[str, Any], num_machines: int
) -> None:
    asked, away = made.boxes[2], made.boxes[3]
    planned = asked.post("place", model=MODEL, **shape)["chosen"]
    instance = asked.load(**shape)
    nodes = within_limits(planned["ranks"], "total_bytes")
    assert nodes == within_limits(instance["ranks"], "memory_bytes")
    assert (instance["strategy"], len(nodes)) == (strategy, num_machines)
    assert ask(away.node, max_tokens=TOKENS, text=STORY, model=instance["id"]) == alone
    unload(asked, instance)


def test_what_no_machine_can_hold_runs_over_two(made: Lab, alone: str) -> None:
    box = made.boxes[3]
    placed = box.post("place", model=MODEL, context=LONG_CONTEXT)
    (single,) = [row for row in placed["rejected"] if row["strategy"] == "single"]
    assert "0.90 GB" in single["why"], single  # what the largest lends
    assert len(within_limits(placed["chosen"]["ranks"], "total_bytes")) > 1
    instance = box.load(context=LONG_CONTEXT, pipeline=2)
    assert len(within_limits(instance["ranks"], "memory_bytes")) == 2
    assert ask(box.node, max_tokens=TOKENS, text=STORY, model=instance["id"]) == alone
    unload(box, instance)


def test_nothing_else_came_from_outside(made: Lab) -> None:
    assert made.fetched() == [FILE]
    assert all(box.node.port_pids() == set() for box in made.boxes)


def unload(box: Box, instance: dict[str, Any]) -> None:
    box.post("unload", id=instance["id"])
    assert instance["id"] not in box.instances()
