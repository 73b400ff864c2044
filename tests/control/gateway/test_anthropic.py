"""Anthropic's messages, asked by the official client."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest

from control.backend import DoneEvent
from control.errors import NotReady
from tests.control.gateway.fake_backend import CONTEXT_TOKENS, MODEL
from tests.control.gateway.live import Live

USER: list[Any] = [{"role": "user", "content": "Say hello"}]
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": USER}
PATH = "/v1/messages"


def seen(live: Live) -> str:
    """The latest prompt as text."""
    ids = live.backend.requests[-1].prompt_ids
    return live.backend.tokenizer.decode(list(ids), skip_special=False)


def test_answers_with_a_message_and_usage(live: Live) -> None:
    answer = live.anthropic.messages.create(**ASK)
    assert answer.id.startswith("msg_")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", MODEL)
    assert [block.to_dict() for block in answer.content] == [
        {"type": "text", "text": "Hello there", "citations": None}
    ]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.input_tokens == len(live.backend.requests[0].prompt_ids)
    assert answer.usage.output_tokens == len(live.backend.tokenizer.encode("Hello there"))


def test_every_field_reaches_the_engine(live: Live) -> None:
    live.anthropic.messages.create(
        model="default",
        max_tokens=7,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
        extra_body={"temperature": 0.25, "top_p": 0.5, "top_k": 40},
        metadata={"user_id": "someone"},
        service_tier="auto",
        thinking={"type": "disabled"},
        tool_choice={"type": "none"},
        extra_headers={"X-Request-Id": "abc-1"},
    )
    (sent,) = live.backend.requests
    assert (sent.max_tokens, sent.temperature, sent.top_p, sent.top_k) == (7, 0.25, 0.5, 40)
    assert sent.request_id == "abc-1"
    assert seen(live) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_goes_on_with_the_assistants_last_turn(live: Live) -> None:
    live.anthropic.messages.create(
        model=MODEL, max_tokens=5, messages=[*USER, {"role": "assistant", "content": "Hel"}]
    )
    assert seen(live).endswith("<|im_start|>assistant\nHel")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason", "stop"),
    [
        ({}, "é the🎉 end", "end_turn", None),
        ({"stop_sequences": ["e🎉", "zz"]}, "é th", "stop_sequence", "e🎉"),
        ({"max_tokens": 3}, "é the", "max_tokens", None),
    ],
)
def test_stop_reasons_whole_and_streamed(
    live: Live, fields: dict[str, Any], text: str, reason: str, stop: str | None, stream: bool
) -> None:
    live.backend.say = "é the🎉 end"
    ask = {**ASK, **fields}
    if stream:
        with live.anthropic.messages.stream(**ask) as events:
            answer: Any = events.get_final_message()
    else:
        answer = live.anthropic.messages.create(**ask)
    assert "".join(block.text for block in answer.content) == text
    assert (answer.stop_reason, answer.stop_sequence) == (reason, stop)
    assert answer.usage.output_tokens > 0
    assert answer.usage.input_tokens == len(live.backend.requests[0].prompt_ids)


def events_of(live: Live, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of a stream, read without a client."""
    text = live.http.post(PATH, json={**ASK, "stream": True, **fields}).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_the_sequence_of_events_is_anthropics(live: Live) -> None:
    live.backend.say = "👩‍👩‍👧 ok"
    found = events_of(live)
    assert all(name == data["type"] for name, data in found)
    names = [name for name, _ in found]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    start = found[0][1]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["input_tokens"] == len(live.backend.requests[0].prompt_ids)
    texts = [data["delta"]["text"] for name, data in found if name == "content_block_delta"]
    assert "".join(texts) == live.backend.say
    assert "\ufffd" not in "".join(texts)


def test_an_empty_answer_has_no_block(live: Live) -> None:
    live.backend.say = ""
    assert live.anthropic.messages.create(**ASK).content == []
    names = [name for name, _ in events_of(live)]
    assert names == ["message_start", "ping", "message_delta", "message_stop"]


def test_count_tokens_counts_what_the_message_would_take(live: Live) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": USER, "system": "Be 🎉."}
    counted = live.anthropic.messages.count_tokens(**fields)
    assert live.backend.requests == []
    answer = live.anthropic.messages.create(**fields, max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens


@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"what": 1}, "what"),
        ({"tools": [{"name": "x", "input_schema": {}}]}, "tools"),
        ({"tool_choice": {"type": "auto"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"cache_control": {"type": "eternal"}}, "cache_control.type"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "text", "text": "x", "what": 1}]}, "system[0].what"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    live: Live, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {**ASK, **fields}
    if path != PATH:
        del body["max_tokens"]
    refused(live.http.post(path, json=body), param)
    assert live.backend.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {"user_id": "a", "what": "b"}}, "metadata.what"),
        ({"stream": "yes"}, "stream"),
        ({"n": 2}, "n"),
    ],
)
def test_ranges_of_a_messages_own_fields(live: Live, fields: dict[str, Any], param: str) -> None:
    refused(live.http.post(PATH, json={**ASK, **fields}), param)


def refused(answer: httpx.Response, param: str) -> None:
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["param"] == param
    assert param in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_a_status_and_the_clients_class(
    live: Live, stream: bool
) -> None:
    create = live.anthropic.messages.create
    with pytest.raises(anthropic.NotFoundError):
        create(**{**ASK, "model": "no"}, stream=stream)
    with pytest.raises(anthropic.BadRequestError, match="context_length_exceeded"):
        create(
            **{**ASK, "messages": [{"role": "user", "content": "x" * CONTEXT_TOKENS}]},
            stream=stream,
        )
    live.backend.fail_at, live.backend.failure = 0, NotReady(MODEL, "gone", retry_after_s=2.5)
    with pytest.raises(anthropic.APIStatusError) as caught:
        create(**ASK, stream=stream)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "3"


def test_an_error_in_mid_stream_is_an_error_event(live: Live) -> None:
    live.backend.fail_at, live.backend.failure = 3, DoneEvent("error", "rank 1 is lost")
    with pytest.raises(anthropic.APIStatusError, match="rank 1 is lost"):
        list(live.anthropic.messages.create(**ASK, stream=True))
    name, data = events_of(live)[-1]
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")


def test_the_client_lists_models(live: Live) -> None:
    found = list(live.anthropic.models.list())
    assert found[0].id == MODEL
    assert found[0].to_dict().items() >= {"type": "model", "display_name": "Tiny"}.items()
    assert live.anthropic.models.retrieve(MODEL).created_at.year == 2023
