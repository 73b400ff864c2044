"""``ctl``'s commands that ask: tables, JSON, orders and refusals, over the real protocol."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ops.ctl_harness import CtlNode, running_node

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlNode]:
    with running_node(tmp_path_factory.mktemp("home")) as made:
        yield made


def test_status_json_is_the_contract_map(node: CtlNode) -> None:
    found = node.ctl("status", "--json")
    assert (found.status, found.err) == (0, "")
    data = found.json
    assert set(data) == {"cluster", "node", "leader", "epoch", "nodes", "instances"}
    assert data["node"] == "n@127.0.0.1"
    assert data["instances"][0]["ranks"][0]["layers"] == [0, 30]
    assert data["nodes"][0]["roles"] == ["compute", "storage"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("status", ["cluster lab", "leader n@127.0.0.1", "Testchip", "lama-1", "ready", "cpu:0"]),
        ("nodes", ["n@127.0.0.1", "compute, storage", "5.0 GB of 8.0 GB", "cpu Testchip"]),
        ("topology", ["3 machines, 1 link", "└─ n@10.0.0.1  ethernet", "0.4 ms  110 MB/s"]),
        ("tree", ["root_sup rest_for_one", "cluster_sup", "restarts 4", "restarting", "├──"]),
        ("model list", ["lama", "101.0 MB", "8192", "Apache-2.0", "big-lama", "remote"]),
        (
            "model ps",
            ["lama-1", "single 1x1", "4711", "0..30", "0..3", "0..9", "97.0 MB", "44.0 MB"],
        ),
        ("place lama", ["lama, not downloaded", "98.0 MB, taken to be Q4_1", "500.0 MB of it to"]),
        ("place lama", ["Chosen: tensor 2x1 shares 2,1, 600.0 MB in all", "6..9", "1024..1536"]),
        ("place lama", ["single 1x1  needs 800.00 GB", "33.0 MB", "162.0 MB", "999.0 MB"]),
    ],
)
def test_tables_contain_the_values(node: CtlNode, command: str, words: list[str]) -> None:
    found = node.ctl(*command.split())
    assert (found.status, found.err) == (0, "")
    for word in words:
        assert word in found.out


@pytest.mark.parametrize("command", ["nodes", "topology", "tree", "model list", "model ps"])
def test_every_data_command_takes_json(node: CtlNode, command: str) -> None:
    found = node.ctl(*command.split(), "--json")
    assert found.status == 0
    assert isinstance(found.json, list | dict)


def test_a_node_is_found_by_name_through_epmd(
    node: CtlNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERL_EPMD_PORT", str(node.epmd_port))
    (node.home / "run.json").rename(node.home / "run.away")
    try:
        assert node.ctl("nodes", "--node", node.name).status == 0
        found = node.ctl("nodes", "--node", "x@127.0.0.1")
    finally:
        (node.home / "run.away").rename(node.home / "run.json")
    assert found.status == 3
    assert "no node x@127.0.0.1" in found.err
    assert node.name in found.err


def test_a_cookie_that_differs_is_told_with_its_file(node: CtlNode) -> None:
    cookie = node.home / "cookie"
    right = cookie.read_text()
    cookie.write_text("WRONG")
    try:
        found = node.ctl("status")
    finally:
        cookie.write_text(right)
    assert (found.status, found.out) == (3, "")
    assert str(cookie) in found.err
    assert "refuses the cookie" in found.err
    assert "WRONG" not in found.err


def test_load_waits_until_the_instance_is_ready(node: CtlNode) -> None:
    found = node.ctl(
        "model", "load", "tiny", "--context", "512", "--shares", "2,1.5", "--engine", "torch",
        "--experts", "across", "--json",
    )  # fmt: skip
    assert found.status == 0
    assert (found.json["id"], found.json["state"]) == ("tiny-1", "ready")
    assert "tiny: downloading from package index" in found.err
    assert "tiny-1: loading" in found.err
    options = (
        "[('context', 512), ('engine', b'torch'), ('experts', b'across'), ('shares', [2, 1.5])]"
    )
    assert f"load tiny {options}" in node.seen


def test_a_load_that_fails_gives_the_reason(node: CtlNode) -> None:
    found = node.ctl("model", "load", "broken")
    assert found.status == 1
    assert "broken-1 failed: tensor blk.0" in found.err


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("model load nothing", "unknown model 'nothing'; known: tiny"),
        ("model unload nothing", "no instance of 'nothing' runs; running: lama-1"),
        ("model pull gone", "no source could be reached"),
        ("place huge", "no card is called huge"),
        ("chat nobody -p hello", "unknown model 'nobody'"),
        ("chat -p hello", "n@127.0.0.1 was started without a model"),
        ("chat lama -p fail", "the rank is lost"),
    ],
)
def test_what_the_cluster_refuses_is_status_1(node: CtlNode, command: str, reason: str) -> None:
    found = node.ctl(*command.split())
    assert (found.status, found.out) == (1, "")
    assert reason in found.err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_place_says_why_nothing_fits_and_shows_what_was_tried(
    node: CtlNode, flags: list[str]
) -> None:
    found = node.ctl("place", "lama", "--slots", "9", *flags)
    assert found.status == 1
    assert "cannot place it: rank 0 needs 800.00 GB" in found.err
    assert "needs 800.00 GB" in found.out
    if flags:
        assert found.json["chosen"] is None


def test_pull_waits_until_the_files_are_here(node: CtlNode) -> None:
    found = node.ctl("model", "pull", "far", "--json")
    assert found.status == 0
    assert (found.json["id"], found.json["state"]) == ("far", "local")
    assert "package index" in found.err


def test_pull_has_another_machine_fetch(node: CtlNode) -> None:
    found = node.ctl("model", "pull", "far", "--to", "n2", "--json")
    assert found.status == 0
    assert (found.json["id"], found.json["state"], found.json["node"]) == ("far", "local", "n2")
    assert "pull far to n2" in node.seen


@pytest.mark.parametrize("name", ["lama", "lama-1", "big-lama"])
def test_unload_takes_a_model_an_alias_or_an_instance(node: CtlNode, name: str) -> None:
    before = len(node.seen)
    found = node.ctl("model", "unload", name, "--json")
    assert (found.status, found.json) == (0, {"unloaded": ["lama-1"]})
    assert node.seen[before:] == ["unload lama-1"]


def test_swap_waits_for_the_new_instance(node: CtlNode) -> None:
    found = node.ctl("model", "swap", "old", "lama")
    assert found.status == 0
    assert "lama-1" in found.out
    assert "swap old lama" in node.seen
