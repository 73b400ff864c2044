"""Models, cluster, health, metrics and docs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from control.backend import LoadOptions, Readiness
from control.gateway.anthropic_types import MessagesRequest
from control.gateway.ask import INERT, Ask
from control.gateway.cluster import PlaceRequest
from control.gateway.health import from_status
from control.gateway.ollama_options import Options
from control.gateway.ollama_types import OllamaChatRequest, OllamaGenerateRequest
from control.gateway.openai_types import ChatRequest, CompletionRequest, Inert
from control.gateway.responses_types import ResponsesRequest
from tests.control.gateway.fake_backend import MODEL, STATUS, FakeBackend, FakeControl
from tests.control.gateway.live import Live, serve

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
FIRST_TOKEN = "phalanx_time_to_first_token_seconds"


@pytest.fixture(scope="module")
def steered() -> Iterator[tuple[Live, FakeControl]]:
    control = FakeControl()
    with serve(FakeBackend(), control=control) as live:
        yield live, control


def test_models_are_listed_ready_ones_first(live: Live) -> None:
    found = list(live.openai.models.list())
    assert [one.id for one in found] == [MODEL, "mute", "hf:org/remote-one"]
    assert found[0].owned_by == "phalanx"
    assert found[0].created == 1_700_000_000


@pytest.mark.parametrize(
    ("asked", "given"), [(MODEL, MODEL), ("default", MODEL), ("hf:org/remote-one",) * 2]
)
def test_one_model_is_found_by_id_or_alias(live: Live, asked: str, given: str) -> None:
    answer = live.http.get(f"/v1/models/{asked}").json()
    assert answer["id"] == given
    assert answer["object"] == "model"
    assert answer["state"] in ("ready", "remote")


def test_a_model_that_is_not_there_is_404(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        live.openai.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_status_nodes_and_instances_need_no_control(live: Live) -> None:
    assert live.http.get("/cluster/status").json() == STATUS
    assert live.http.get("/cluster/nodes").json() == STATUS["nodes"]
    assert live.http.get("/cluster/instances").json() == STATUS["instances"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "topology", None),
        ("GET", "tree", None),
        ("GET", "events", None),
        ("POST", "load", {"model": "x"}),
        ("POST", "place", {"model": "x"}),
        ("POST", "unload", {"id": "x"}),
        ("POST", "swap", {"old": "x", "new": "y"}),
    ],
)
def test_without_a_cluster_nothing_can_be_steered(
    live: Live, method: str, path: str, body: Any
) -> None:
    answer = live.http.request(method, f"/cluster/{path}", json=body)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "no_cluster"


def test_operators_words_reach_the_cluster(steered: tuple[Live, FakeControl]) -> None:
    live, control = steered
    options = {"tensor": 2, "pipeline": 1, "shares": [2, 0.5], "engine": "torch", "context": 512}
    more = {"slots": 4, "threads": 1, "device": "cpu", "experts": "inside"}
    aims = {"goal": "throughput", "replicas": 2, "priority": -1}
    body = {"model": "m", **options, **more, **aims}
    shape = LoadOptions(
        tensor=2,
        pipeline=1,
        shares=(2, 0.5),
        experts="inside",
        engine="torch",
        context_tokens=512,
        slots=4,
        threads=1,
        device="cpu",
        goal="throughput",
        replicas=2,
        priority=-1,
    )
    assert live.http.post("/cluster/place", json=body).json()["chosen"] == {"tensor_size": 2}
    assert live.http.post("/cluster/load", json=body).json() == {"id": "m-1"}
    assert live.http.post("/cluster/load", json={"model": "m", "shares": []}).is_success
    assert live.http.post("/cluster/unload", json={"id": "tiny-1"}).json() == {"id": "tiny-1"}
    assert live.http.post("/cluster/swap", json={"old": "a", "new": "b"}).json() == {"id": "b-1"}
    assert control.asked == [
        ("place", "m", shape),
        ("load", "m", shape),
        ("load", "m", LoadOptions()),
        ("unload", "tiny-1"),
        ("swap", "a", "b"),
    ]
    assert live.http.get("/cluster/topology").json()[0]["latency_s"] == 0.001
    assert live.http.get("/cluster/tree").json()["id"] == "root_sup"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("load", {"model": "nope"}, 404, "model"),
        ("unload", {"id": "nope"}, 404, None),
        ("load", {"model": "m", "what": 1}, 400, "what"),
        ("load", {"model": "m", "tensor": 0}, 400, "tensor"),
        ("load", {"model": "m", "shares": [1, 0]}, 400, "shares[1]"),
        ("place", {"model": "m", "experts": "outside"}, 400, "experts"),
        ("load", {"model": "m", "engine": "cuda"}, 400, "engine"),
        ("swap", {"old": "m"}, 400, "new"),
    ],
)
def test_what_operators_get_wrong(
    steered: tuple[Live, FakeControl], path: str, body: Any, status: int, param: str | None
) -> None:
    answer = steered[0].http.post(f"/cluster/{path}", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param


def test_the_feed_begins_with_the_status_and_goes_on_with_changes() -> None:
    with serve(FakeBackend(), control=FakeControl()) as live:
        seen: list[tuple[str, Any]] = []
        with live.http.stream("GET", "/cluster/events") as feed:
            name = ""
            for line in feed.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    seen.append((name, json.loads(line.removeprefix("data: "))))
                    if len(seen) == 2:
                        # a feed has no end of its own: stopping the server ends it, at once
                        live.call(live.server.stop(30.0))
    assert seen == [("status", STATUS), ("instance", {"id": "tiny-1"})]


def test_health(steered: tuple[Live, FakeControl], live: Live) -> None:
    assert live.http.get("/health").json() == {"status": "ok"}
    assert live.http.get("/health/ready").json() == {"status": "ready"}
    other, control = steered
    assert other.http.get("/health/ready").status_code == 200
    control.ready = Readiness(False, "rank 0 of tiny-1 is silent for 3.0 s", 2.5)
    answer = other.http.get("/health/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
    assert "silent" in answer.json()["why"]


@pytest.mark.parametrize(
    ("instances", "why"),
    [
        ([], "no instance is ready"),
        ([{"id": "a", "state": "loading", "ranks": []}], "no instance is ready"),
        ([{"id": "a", "state": "ready", "ranks": [{"rank": 1, "state": "lost"}]}], "rank 1 of a"),
    ],
)
def test_readiness_from_the_status_map(instances: list[Any], why: str) -> None:
    found = from_status({"instances": instances})
    assert not found.ready
    assert why in found.why


def test_metrics_count_requests_tokens_and_times(live: Live) -> None:
    def read() -> list[float]:
        return [
            live.metric("phalanx_requests_total", route="/v1/chat/completions", status="200"),
            live.metric("phalanx_requests_total", route="/v1/chat/completions", status="404"),
            live.metric("phalanx_requests_total", route="unmatched", status="404"),
            live.metric("phalanx_tokens_total", kind="prompt"),
            live.metric("phalanx_tokens_total", kind="completion"),
            live.metric(f"{FIRST_TOKEN}_count"),
            live.metric("phalanx_inter_token_seconds_count"),
        ]

    before = read()
    answers = [live.openai.chat.completions.create(**ASK, n=2)]
    list(live.openai.chat.completions.create(**ASK, stream=True))
    live.http.post("/v1/chat/completions", json={**ASK, "model": "no"})
    live.http.get("/nothing/at/all")
    after = read()
    one = len(live.backend.tokenizer.encode("Hello there"))
    prompt = len(live.backend.requests[0].prompt_ids)
    assert answers[0].usage is not None
    assert answers[0].usage.completion_tokens == 2 * one
    changes = [now - then for now, then in zip(after, before, strict=True)]
    assert changes == [2, 1, 1, 2 * prompt, 3 * one, 3, 3 * (one - 1)]
    assert live.metric("phalanx_active_generations") == 0
    assert "phalanx_recovery_pause_seconds_bucket" in live.http.get("/metrics").text


def test_docs_list_every_field_and_load_nothing_from_elsewhere(live: Live) -> None:
    answer = live.http.get("/docs")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<script" not in answer.text
    assert not re.findall(r"https?://", answer.text)
    bodies: list[type[Ask]] = [ChatRequest, CompletionRequest, ResponsesRequest, PlaceRequest]
    bodies += [MessagesRequest, OllamaChatRequest, OllamaGenerateRequest]
    for body in bodies:
        for name in body.model_fields:
            assert f"<code>{name}</code>" in answer.text
    for name in Options.model_fields:
        assert f"<code>options.{name}</code>" in answer.text
    assert "<code>messages[].content[].text</code>" in answer.text
    for name in (*Inert.model_fields, "options.num_gpu", "cache_control"):
        row = answer.text.partition(f"<code>{name}</code>")[2].partition("</tr>")[0]
        assert INERT in row, name
    spec = live.http.get("/openapi.json").json()
    for path in spec["paths"]:
        assert path in answer.text
    assert "/v1/chat/completions" in spec["paths"]
