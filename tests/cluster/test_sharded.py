"""A real model over several ranks: the same answers as one, whatever happens to the ranks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Term
from tests.cluster.conftest import MODEL
from tests.cluster.live_node import LiveNode, free_tcp_port
from tests.cluster.test_end_to_end import Stream, ask
from tests.cluster.test_supervision import on_node
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

STORY = "Tell me a long story about a fox."
LONG = 100  # tokens: more than a stream has when its rank is killed


@pytest.fixture(scope="module")
def node(models_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveNode]:
    """A node with the default model on one rank, to compare with."""
    made = LiveNode(tmp_path_factory.mktemp("node"), "sharded@127.0.0.1", free_tcp_port())
    try:
        yield made.start("--config", str(models_config))
    finally:
        status = made.stop()
    assert status == 0, "\n".join(made.lines)
    assert not made.port_pids()


@pytest.fixture(scope="module")
def undisturbed(node: LiveNode) -> str:
    """What one rank answers, greedily."""
    return ask(node, max_tokens=LONG, text=STORY)


@contextmanager
def loaded(node: LiveNode, shape: str) -> Iterator[str]:
    """The default model in another shape; the id of its instance."""
    before = {row["id"] for row in node.status()["instances"]}
    done = node.ctl("model", "load", MODEL, *shape.split())
    assert done.returncode == 0, done.stderr
    (new,) = {row["id"] for row in node.status()["instances"]} - before
    try:
        yield new
    finally:
        assert node.ctl("model", "unload", new).returncode == 0


def instance(node: LiveNode, id_: str) -> dict[str, Any]:
    return next(dict(row) for row in node.status()["instances"] if row["id"] == id_)


def pids(node: LiveNode, id_: str) -> list[int]:
    return [rank["os_pid"] for rank in instance(node, id_)["ranks"]]


@pytest.mark.parametrize(
    ("shape", "strategy", "size", "layers", "kv_heads", "query_heads"),
    [
        ("--tensor 2", "tensor", (2, 1), [[0, 30]] * 2, [[0, 2], [2, 3]], [[0, 6], [6, 9]]),
        (
            "--tensor 3 --shares 2,1,1",
            "tensor",
            (3, 1),
            [[0, 30]] * 3,
            [[0, 1], [1, 2], [2, 3]],
            [[0, 3], [3, 6], [6, 9]],
        ),
        ("--pipeline 2", "pipeline", (1, 2), [[0, 15], [15, 30]], [[0, 3]] * 2, [[0, 9]] * 2),
        (
            "--tensor 2 --pipeline 2",
            "mixed",
            (2, 2),
            [[0, 15], [0, 15], [15, 30], [15, 30]],
            [[0, 2], [2, 3]] * 2,
            [[0, 6], [6, 9]] * 2,
        ),
    ],
)
def test_every_shape_gives_the_answer_of_one_rank(
    node: LiveNode,
    undisturbed: str,
    shape: str,
    strategy: str,
    size: tuple[int, int],
    layers: list[list[int]],
    kv_heads: list[list[int]],
    query_heads: list[list[int]],
) -> None:
    with loaded(node, shape) as id_:
        assert undisturbed.startswith(ask(node, max_tokens=60, text=STORY, model=id_))
        found = instance(node, id_)
        assert (found["strategy"], found["engine"], found["epoch"]) == (strategy, "torch", 1)
        assert (found["tensor_size"], found["pipeline_size"]) == size
        ranks = found["ranks"]
        assert [rank["rank"] for rank in ranks] == list(range(size[0] * size[1]))
        assert [rank["layers"] for rank in ranks] == layers
        assert [rank["kv_heads"] for rank in ranks] == kv_heads
        assert [rank["query_heads"] for rank in ranks] == query_heads
        assert {rank["kernels"] for rank in ranks} == {"compiled"}
        assert len({rank["os_pid"] for rank in ranks}) == len(ranks)
        for rank in ranks:
            assert rank["memory_bytes"] > rank["weights_bytes"] > 10e6
        table = node.ctl("status").stdout
        assert f"{strategy} {size[0]}x{size[1]}" in table
        assert f"{layers[-1][0]}..{layers[-1][1]}" in table


def hit(node: LiveNode, id_: str, rank: int, sign: signal.Signals, undisturbed: str) -> float:
    """Send a signal to a rank of a stream that runs; the pause that its client saw, in seconds."""
    stream = Stream(node, max_tokens=LONG, model=id_)
    wait_until(lambda: len(stream.pieces) > 15, 30)
    before = pids(node, id_)
    os.kill(before[rank], sign)
    assert stream.result() == undisturbed
    wait_until(lambda: not set(before) & set(pids(node, id_)), 10, "every rank is replaced")
    for pid in before:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    pauses = zip(stream.times_s, stream.times_s[1:], strict=False)
    return max(after - earlier for earlier, after in pauses)


def test_a_lost_tensor_rank_costs_a_stream_a_pause_and_nothing_else(
    node: LiveNode, undisturbed: str
) -> None:
    with loaded(node, "--tensor 2") as id_:
        assert hit(node, id_, 0, signal.SIGKILL, undisturbed) < 6.0
        assert hit(node, id_, 1, signal.SIGKILL, undisturbed) < 6.0
        # 3 s until its silence is noticed, then as one that was killed.
        assert hit(node, id_, 1, signal.SIGSTOP, undisturbed) < 9.0
        found = instance(node, id_)
        assert (found["state"], found["epoch"], found["restarts"]) == ("ready", 4, 3)


def test_a_lost_stage_costs_a_stream_a_pause_and_nothing_else(
    node: LiveNode, undisturbed: str
) -> None:
    with loaded(node, "--pipeline 2") as id_:
        assert hit(node, id_, 0, signal.SIGKILL, undisturbed) < 6.0
        assert hit(node, id_, 1, signal.SIGKILL, undisturbed) < 6.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor": 10}, ["10 tensor ranks, but 9 attention heads", "1,1,1,1,1,1,1,1,1"]),
        ({"pipeline": 31, "slots": 1}, ["31 pipeline stages, but 30 layers"]),
        ({"tensor": 2, "shares": [1, 2, 3]}, ["3 numbers", "= 2 ranks"]),
        ({"tensor": 2, "slots": 1024}, ["rank 1 needs", "KV cache", "lends"]),
        ({"tensor": 2, "experts": "across"}, ["experts=across", "has none"]),
        ({"engine": "mlx", "device": "cpu"}, ["engine='mlx' does not run on device='cpu'"]),
    ],
)
def test_a_bad_shape_is_refused_with_numbers(
    node: LiveNode, options: dict[str, Any], words: list[str]
) -> None:
    body = {"model": MODEL, **options}
    refused = httpx.post(f"{node.url}/cluster/load", json=body, timeout=60)
    assert refused.status_code == 400
    placed = httpx.post(f"{node.url}/cluster/place", json=body, timeout=60).json()
    for word in words:
        assert word in refused.json()["error"]["message"]
        assert word in (placed["why"] if "why" in placed else placed["error"]["message"])
    assert len(node.status()["instances"]) == 1


def test_ctl_refuses_what_the_node_refuses(node: LiveNode) -> None:
    for command in (["model", "load"], ["place"]):
        done = node.ctl(*command, MODEL, "--tensor", "10")
        assert done.returncode == 1
        assert "10 tensor ranks, but 9 attention heads" in done.stderr


def test_place_is_what_load_does(node: LiveNode) -> None:
    shape = ["--tensor", "2", "--shares", "1,2", "--slots", "2"]
    done = node.ctl("place", MODEL, *shape, "--json")
    assert done.returncode == 0
    placed = json.loads(done.stdout)["chosen"]["ranks"]
    with loaded(node, " ".join(shape)) as id_:
        ranks = instance(node, id_)["ranks"]
    for name in ("layers", "kv_heads", "query_heads", "ffn", "vocab", "device", "kernels"):
        assert [rank[name] for rank in ranks] == [rank[name] for rank in placed], name
    for name in ("weights_bytes", "kv_bytes"):
        for rank, expected in zip(ranks, placed, strict=True):
            assert rank[name] == pytest.approx(expected[name], rel=0.02), name


def test_erlang_asks_where_a_model_would_go(node: LiveNode) -> None:
    async def place(me: Process, to: str) -> Term:
        request = (Atom("place"), MODEL, {Atom("pipeline"): 3})
        return await gen_server.call(me, ("cluster", to), request, timeout_s=30)

    ok, found = on_node(node, place)
    assert ok == "ok"
    assert found["chosen"]["strategy"] == "pipeline"
    layers = [rank["layers"] for rank in found["chosen"]["ranks"]]
    assert (len(layers), layers[0][0], layers[2][1]) == (3, 0, 30)


def test_the_id_of_a_group_is_in_no_log(node: LiveNode) -> None:
    """By now groups were made, lost and made again."""
    logs = [path.read_text(errors="replace") for path in (node.home / "logs").iterdir()]
    assert not any("group =>" in text or "'group'" in text for text in logs)


def test_a_new_control_process_adopts_all_ranks_or_none(node: LiveNode, undisturbed: str) -> None:
    with loaded(node, "--tensor 2") as id_:
        ranks, control = pids(node, id_), node.control_pid()
        os.kill(control, signal.SIGKILL)
        node.wait_ready(2, timeout_s=30)
        assert node.control_pid() != control
        wait_until(lambda: instance(node, id_)["state"] == "ready", 10)
        assert pids(node, id_) == ranks, "the weights stayed where they were"
        assert undisturbed.startswith(ask(node, max_tokens=30, text=STORY, model=id_))

        # Now a rank is lost with the control process: the other starts anew as well.
        os.kill(node.control_pid(), signal.SIGKILL)
        os.kill(ranks[1], signal.SIGKILL)
        node.wait_ready(3, timeout_s=30)
        wait_until(lambda: instance(node, id_)["state"] == "ready", 20)
        assert not set(ranks) & set(pids(node, id_))
        assert undisturbed.startswith(ask(node, max_tokens=30, text=STORY, model=id_))
