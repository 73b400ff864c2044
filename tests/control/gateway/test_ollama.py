"""Ollama's API, asked by the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from control.backend import DoneEvent, PullProgress
from control.errors import DownloadFailed
from control.gateway.ollama_types import OllamaChatRequest
from control.gateway.settings import GatewaySettings
from tests.control.gateway.fake_backend import CONTEXT_TOKENS, MODEL, FakeBackend, FakeControl
from tests.control.gateway.live import Live, serve

USER: list[Any] = [{"role": "user", "content": "Say hello"}]
CHAT, GENERATE = "/api/chat", "/api/generate"


@pytest.fixture(scope="module")
def steered_once() -> Iterator[tuple[Live, FakeControl]]:
    control = FakeControl()
    with serve(FakeBackend(), control=control, settings=GatewaySettings()) as live:
        yield live, control


@pytest.fixture
def steered(steered_once: tuple[Live, FakeControl]) -> tuple[Live, FakeControl]:
    live, control = steered_once
    live.backend.reset()
    control.__init__()  # type: ignore[misc]
    return live, control


def seen(live: Live) -> str:
    """The latest prompt as text."""
    ids = live.backend.requests[-1].prompt_ids
    return live.backend.tokenizer.decode(list(ids), skip_special=False)


def test_chat_answers_whole_with_counts_and_times(live: Live) -> None:
    answer = live.ollama.chat(f"{MODEL}:latest", messages=USER)
    assert (answer.model, answer.message.role, answer.message.content) == (
        MODEL,
        "assistant",
        "Hello there",
    )
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.prompt_eval_count == len(live.backend.requests[0].prompt_ids)
    assert answer.eval_count == len(live.backend.tokenizer.encode("Hello there"))
    assert answer.total_duration is not None
    parts = (answer.load_duration, answer.prompt_eval_duration, answer.eval_duration)
    assert all(part is not None and part >= 0 for part in parts)
    assert sum(part or 0 for part in parts) <= answer.total_duration + 3


@pytest.mark.parametrize("text", ["Hello there", "👩‍👩‍👧 é\u2028end", ""])
def test_streams_hold_the_same_text(live: Live, text: str) -> None:
    live.backend.say = text
    chat = list(live.ollama.chat(MODEL, messages=USER, stream=True))
    plain = list(live.ollama.generate(MODEL, "hi", stream=True))
    assert "".join(one.message.content or "" for one in chat) == text
    assert "".join(one.response or "" for one in plain) == text
    for lines in (chat, plain):
        assert [one.done for one in lines] == [False] * (len(lines) - 1) + [True]
        assert lines[-1].eval_count == len(live.backend.tokenizer.encode(text))


def test_streams_are_lines_of_json_by_default(live: Live) -> None:
    answer = live.http.post(CHAT, json={"model": MODEL, "messages": USER})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.split("\n") if line]
    assert "".join(one["message"]["content"] for one in lines) == "Hello there"
    assert all(one["created_at"].endswith("Z") for one in lines)


def test_options_reach_the_engine(live: Live) -> None:
    live.ollama.chat(
        MODEL,
        messages=[{"role": "system", "content": "Be brief."}, *USER],
        options={
            "temperature": 0.25,
            "top_k": 7,
            "top_p": 0.5,
            "min_p": 0.1,
            "seed": 3,
            "num_predict": 9,
            "num_ctx": 200,
            "presence_penalty": 1,
            "frequency_penalty": 0.5,
            "repeat_penalty": 1.0,
            "num_thread": 4,
            "num_gpu": 0,
            "use_mmap": True,
        },
        keep_alive="5m",
        think=False,
    )
    (sent,) = live.backend.requests
    assert (sent.temperature, sent.top_k, sent.top_p, sent.min_p) == (0.25, 7, 0.5, 0.1)
    assert (sent.seed, sent.max_tokens) == (3, 9)
    assert (sent.presence_penalty, sent.frequency_penalty) == (1.0, 0.5)
    live.ollama.chat(MODEL, messages=USER, options={"num_predict": -1, "num_ctx": 100})
    sent = live.backend.requests[-1]
    assert (sent.temperature, sent.top_k, sent.top_p) == (0.8, 40, 0.9)
    assert sent.max_tokens == 100 - len(sent.prompt_ids)


def test_generate_renders_or_takes_the_prompt_as_it_is(live: Live) -> None:
    live.ollama.generate(MODEL, "hi", system="Be brief.")
    assert seen(live) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    live.ollama.generate("mute", "hi", raw=True)
    assert seen(live) == "hi"
    live.ollama.chat(MODEL, messages=[*USER, {"role": "assistant", "content": "Hel"}])
    assert seen(live).endswith("<|im_start|>assistant\nHel")


def test_stop_and_logprobs(live: Live) -> None:
    live.backend.say = "ab the end"
    answer = live.ollama.generate(
        MODEL, "hi", options={"stop": [" the"]}, logprobs=True, top_logprobs=2
    )
    assert (answer.response, answer.done_reason) == ("ab", "stop")
    assert [one.token for one in answer.logprobs or []] == ["a", "b"]
    assert [len(one.top_logprobs or []) for one in answer.logprobs or []] == [2, 2]
    chunks = list(live.ollama.chat(MODEL, messages=USER, stream=True, logprobs=True))
    found = [one.token for chunk in chunks for one in chunk.logprobs or []]
    assert "".join(found) == live.backend.say
    short = live.ollama.generate(MODEL, "hi", options={"num_predict": 2})
    assert short.done_reason == "length"


def test_nothing_to_say_loads_or_unloads(steered: tuple[Live, FakeControl]) -> None:
    live, control = steered
    assert live.ollama.generate(MODEL).done_reason == "load"
    assert live.ollama.chat("default").message.content == ""
    assert control.asked == []
    assert live.ollama.generate(MODEL, keep_alive=0).done_reason == "unload"
    assert live.ollama.chat(MODEL, keep_alive="0s").done_reason == "unload"
    assert control.asked == [("unload", "tiny-1")] * 2
    assert live.backend.requests == []
    with pytest.raises(ollama.ResponseError) as caught:
        live.ollama.generate("no")
    assert caught.value.status_code == 404


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"what": 1}, "what"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"format": "json"}, "format"),
        (CHAT, {"format": {"type": "object"}}, "format"),
        (CHAT, {"think": True}, "think"),
        (CHAT, {"think": "high"}, "think"),
        (CHAT, {"truncate": True}, "truncate"),
        (CHAT, {"keep_alive": 0}, "keep_alive"),
        (CHAT, {"keep_alive": "soon"}, "keep_alive"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"stream": 1}, "stream"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x", "images": ["eA=="]}]},
            "messages[0].images",
        ),
        (CHAT, {"options": {"what": 1}}, "options.what"),
        (CHAT, {"options": {"repeat_penalty": 1.1}}, "options.repeat_penalty"),
        (CHAT, {"options": {"mirostat": 1}}, "options.mirostat"),
        (CHAT, {"options": {"num_predict": 0}}, "options.num_predict"),
        (CHAT, {"options": {"num_ctx": CONTEXT_TOKENS + 1}}, "options.num_ctx"),
        (CHAT, {"options": {"top_p": 2}}, "options.top_p"),
        (GENERATE, {"suffix": "x"}, "suffix"),
        (GENERATE, {"template": "x"}, "template"),
        (GENERATE, {"context": [1]}, "context"),
        (GENERATE, {"images": ["eA=="]}, "images"),
        (GENERATE, {"raw": True, "system": "x"}, "system"),
        (GENERATE, {"width": 5}, "width"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_honoured_is_refused_by_name(
    live: Live, path: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    base: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "x"}
    answer = live.http.post(path, json={"model": MODEL, "stream": stream, **base, **fields})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    assert param in answer.json()["error"]
    assert live.backend.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_a_status(live: Live, stream: bool) -> None:
    def ask(model: str, text: str) -> None:
        if stream:
            list(live.ollama.generate(model, text, stream=True))
        else:
            live.ollama.generate(model, text)

    with pytest.raises(ollama.ResponseError) as caught:
        ask("no", "x")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="context holds") as caught:
        ask(MODEL, "x" * CONTEXT_TOKENS)
    assert caught.value.status_code == 400
    live.backend.fail_at, live.backend.failure = 0, DoneEvent("error", "no")
    with pytest.raises(ollama.ResponseError) as caught:
        ask(MODEL, "x")
    assert caught.value.status_code == 500


def test_an_error_in_mid_stream_is_a_last_line(live: Live) -> None:
    live.backend.fail_at, live.backend.failure = 3, DoneEvent("error", "rank 1 is lost")
    with pytest.raises(ollama.ResponseError, match="rank 1 is lost"):
        list(live.ollama.chat(MODEL, messages=USER, stream=True))


def test_lists_shows_and_says_what_runs(live: Live) -> None:
    listed = live.ollama.list().models
    assert [one.model for one in listed] == [MODEL, "mute"], "not what is only known by name"
    assert listed[0].details is not None
    assert listed[0].details.family == "llama"
    (running,) = live.ollama.ps().models
    assert (running.model, running.context_length) == (MODEL, CONTEXT_TOKENS)
    assert running.digest == listed[0].digest
    shown = live.ollama.show(MODEL)
    assert shown.capabilities == ["completion"]
    assert "im_start" in (shown.template or "")
    assert (shown.modelinfo or {})["llama.context_length"] == CONTEXT_TOKENS
    assert live.http.post("/api/show", json={"name": MODEL}).json()["template"] == shown.template
    assert live.http.get("/api/version").json()["version"]
    with pytest.raises(ollama.ResponseError) as caught:
        live.ollama.show("no")
    assert caught.value.status_code == 404


def test_pull_tells_its_progress(steered: tuple[Live, FakeControl]) -> None:
    live, control = steered
    control.pulled = (
        PullProgress(phase="waiting"),
        PullProgress(phase="downloading", source="hub a/b", done_bytes=5, total_bytes=10),
        PullProgress(phase="verifying"),
        PullProgress(phase="done"),
    )
    lines = list(live.ollama.pull("hf:a/b", stream=True))
    statuses = ["pulling manifest", "waiting", "pulling hub a/b", "verifying", "success"]
    assert [one.status for one in lines] == statuses
    assert (lines[2].completed, lines[2].total) == (5, 10)
    assert lines[2].digest
    assert live.ollama.pull("hf:a/b").status == "success"
    assert control.asked == [("pull", "hf:a/b")] * 2


def test_a_pull_that_fails_says_why(steered: tuple[Live, FakeControl]) -> None:
    live, control = steered
    for stream in (False, True):
        answer = live.http.post("/api/pull", json={"model": "nope", "stream": stream})
        assert answer.status_code == 404
        assert "unknown model" in answer.json()["error"]
    control.pulled = (PullProgress(phase="waiting"), DownloadFailed("a/b", "the disk is slow"))
    with pytest.raises(ollama.ResponseError, match="the disk is slow"):
        list(live.ollama.pull("hf:a/b", stream=True))
    with pytest.raises(ollama.ResponseError) as caught:
        live.ollama.pull("hf:a/b")
    assert caught.value.status_code == 400
    answer = live.http.post("/api/pull", json={"model": "x", "insecure": True})
    assert answer.status_code == 400
    assert "insecure" in answer.json()["error"]


def test_delete(steered: tuple[Live, FakeControl]) -> None:
    live, control = steered
    assert live.ollama.delete(MODEL).status == "success"
    assert control.asked == [("remove", MODEL)]
    with pytest.raises(ollama.ResponseError) as caught:
        live.ollama.delete("no")
    assert caught.value.status_code == 404


def test_bodies_as_ollamas_own_command_sends_them(steered: tuple[Live, FakeControl]) -> None:
    live, control = steered
    control.pulled = (PullProgress(phase="done"),)
    show = {"model": MODEL, "system": "", "template": "", "verbose": False, "options": None}
    load = {
        "model": MODEL,
        "prompt": "",
        "suffix": "",
        "system": "",
        "template": "",
        "stream": False,
    }
    pull = {"model": MODEL, "username": "", "password": "", "name": "", "stream": False}
    talk: dict[str, Any] = {
        "model": MODEL,
        "messages": USER,
        "options": {},
        "keep_alive": "5m0s",
        "tools": None,
    }
    for path, body in (
        ("/api/show", {**show, "name": ""}),
        (GENERATE, {**load, "options": None}),
        ("/api/pull", pull),
        (CHAT, talk),
    ):
        answer = live.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
    answer = live.http.request("DELETE", "/api/delete", json={"model": MODEL, "name": MODEL})
    assert answer.status_code == 200
    answer = live.http.post("/api/show", json={"model": MODEL, "name": "another"})
    assert (answer.status_code, "name" in answer.json()["error"]) == (400, True)
    answer = live.http.post("/api/show", json={"model": MODEL, "template": "x"})
    assert (answer.status_code, "template" in answer.json()["error"]) == (400, True)


def test_embeddings_are_refused_on_both_routes(live: Live) -> None:
    with pytest.raises(ollama.ResponseError, match="embeddings") as caught:
        live.ollama.embed(MODEL, ["a", "b"])
    assert caught.value.status_code == 400
    answer = live.http.post("/v1/embeddings", json={"model": MODEL, "input": "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    answer = live.http.post("/v1/embeddings", json={"model": MODEL, "input": "x", "what": 1})
    assert answer.json()["error"]["param"] == "what"


@pytest.mark.parametrize(
    ("keep_alive", "unloads"),
    [(0, True), ("0", True), ("0s", True), ("0h0m", True), (-1, False), ("-1", False),
     ("10m", False), ("1h0m", False), (300, False), (None, False)],
)  # fmt: skip
def test_which_keep_alive_is_no_time(keep_alive: Any, unloads: bool) -> None:
    body = OllamaChatRequest.model_validate({"model": MODEL, "keep_alive": keep_alive})
    assert body.unloads == unloads
