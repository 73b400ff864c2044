"""Real models on meshes of real processes: the tokens of one rank, and what a lost rank does."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import open_checkpoint
from tests.compute.mesh_processes import Mesh
from tests.models.default_model import default_model_path, model_path

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village at the edge of the forest, there lived",
]
COUNT = 12
SHAPES: list[dict[str, Any]] = [
    {"tensor": 2},
    {"tensor": 3, "shares": [2, 1, 1]},
    {"pipeline": 2},
    {"pipeline": 3, "shares": [1, 1, 2]},
    {"tensor": 2, "pipeline": 2, "shares": [2, 1, 2, 1]},
]


def prompts_of(path: Path) -> list[list[int]]:
    tokenizer = open_checkpoint(path).tokenizer()
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "gemma3-270m"])
def test_every_mesh_gives_the_greedy_tokens_of_one_rank(model: str) -> None:
    path = model_path(model)
    prompts = prompts_of(path)
    with Mesh(path) as one:
        expected = one.load().generate(prompts, COUNT)["ids"]
    assert [len(ids) for ids in expected] == [COUNT] * len(prompts)
    for shape in SHAPES:
        with Mesh(path, **shape) as mesh:
            mesh.load()
            assert all("error" not in facts for facts in mesh.facts), (shape, mesh.facts)
            assert mesh.generate(prompts, COUNT)["ids"] == expected, shape
            assert mesh.generate(prompts[1:2], 4, chunk=3)["ids"] == [expected[1][:4]], shape


@pytest.mark.slow
def test_ranks_hold_what_their_shares_say() -> None:
    with Mesh(default_model_path(), tensor=2, pipeline=2, shares=[2, 1, 2, 1]) as mesh:
        mesh.load()
        layers = [facts["layers"] for facts in mesh.facts]
        assert layers[0] == layers[1]
        assert layers[2] == layers[3]
        assert (layers[0][0], layers[0][1], layers[2][1]) == (0, layers[2][0], 30)
        assert [facts["kv_heads"] for facts in mesh.facts] == [[0, 2], [2, 3]] * 2
        assert [facts["query_heads"] for facts in mesh.facts] == [[0, 6], [6, 9]] * 2
        assert mesh.facts[0]["weights_bytes"] > mesh.facts[1]["weights_bytes"]


TENSOR, PIPELINE = {"tensor": 2}, {"pipeline": 2}
LOSSES = [
    (TENSOR, 0, signal.SIGKILL),
    (TENSOR, 1, signal.SIGKILL),
    (TENSOR, 0, signal.SIGSTOP),
    (TENSOR, 1, signal.SIGSTOP),
    (PIPELINE, 0, signal.SIGKILL),
    (PIPELINE, 1, signal.SIGKILL),
    (PIPELINE, 0, signal.SIGSTOP),
    (PIPELINE, 1, signal.SIGSTOP),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "lost", "how"), LOSSES)
def test_a_lost_rank_ends_the_others_in_time(
    shape: dict[str, Any], lost: int, how: signal.Signals
) -> None:
    """Whoever waits for it says so: at once where it died, by the time-out where it is silent."""
    with Mesh(default_model_path(), step_timeout_s=1.0, **shape) as mesh:
        mesh.load()
        mesh.tell(mesh.head, {"generate": [[504, 2365]], "count": 500})
        at_s = time.monotonic()
        mesh.signal(lost, how)
        answer = mesh.hear(1 - lost)
        assert answer["error"] == "PeerLost", answer
        assert f"rank {lost} is lost" in answer["text"], answer
        assert answer["at_s"] - at_s < (1.0 if how == signal.SIGKILL else 5.0), answer


@pytest.mark.slow
def test_the_middle_of_a_pipeline_is_named_by_its_number_in_the_mesh() -> None:
    with Mesh(default_model_path(), pipeline=3, step_timeout_s=2.0) as mesh:
        mesh.load()
        mesh.tell(mesh.head, {"generate": [[504, 2365]], "count": 500})
        mesh.signal(1, signal.SIGKILL)
        assert "rank 1 is lost" in mesh.hear(2)["text"]


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_missed() -> None:
    with Mesh(default_model_path(), tensor=2, join_timeout_s=1.0) as mesh:
        mesh.load(ranks=[1])
        (answer,) = mesh.facts
        assert answer["error"] == "PeerLost", answer


@pytest.mark.slow
def test_ranks_of_two_groups_never_meet() -> None:
    path = default_model_path()
    with Mesh(path, tensor=2, join_timeout_s=2.0) as one:
        for rank in (0, 1):
            one.tell(rank, {"prepare": "127.0.0.1"})
        places = [one.hear(rank) for rank in (0, 1)]
        for rank in (0, 1):
            order = {**one.order, "rank": rank, "places": places, "group": f"group {rank}"}
            one.tell(rank, {"load": order})
        answers = [one.hear(rank) for rank in (0, 1)]
        assert {answer["error"] for answer in answers} <= {"PeerLost", "JoinRefused"}, answers


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"limit_bytes": 100 << 20}, "NoRoom", "weights"),
    ({"shares": [1, 1, 1]}, "BadRequest", "shares: expected 2"),
    ({"shares": [1, "x"]}, "BadRequest", "shares: expected numbers"),
    ({"shares": [1, 0]}, "IllegalShares", "positive"),
    ({"rank": 7}, "BadRequest", "rank 7 of a mesh"),
    ({"group": ""}, "BadRequest", "need a group"),
    ({"places": ["here", "there"]}, "BadRequest", "what prepare gave"),
    ({"experts": "somewhere"}, "BadRequest", "inside or across"),
    ({"device": "tpu"}, "ValueError", "unknown device"),
    ({"context_tokens": 1 << 20}, "ValueError", "beyond the model's"),
    ({"num_slots": 0}, "ValueError", "at least 1"),
]


@pytest.mark.slow
def test_an_order_that_cannot_be_is_refused() -> None:
    with Mesh(default_model_path(), tensor=2) as mesh:
        mesh.tell(0, {"prepare": "127.0.0.1"})
        place = mesh.hear(0)
        for change, kind, text in REFUSED:
            order = {**mesh.order, "rank": 0, "places": [place, place], **change}
            mesh.tell(0, {"load": order})
            answer = mesh.hear(0)
            assert answer.get("error") == kind, (change, answer)
            assert text in answer["text"], (change, answer)
