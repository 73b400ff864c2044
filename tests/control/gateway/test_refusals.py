"""Every request that cannot be served gets a status, a shape and the field's name."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from control.gateway.settings import MAX_BODY_BYTES
from tests.control.gateway.fake_backend import CONTEXT_TOKENS, MODEL
from tests.control.gateway.live import Live

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
SAY: dict[str, Any] = {"model": MODEL, "prompt": "hi"}


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["x-request-id"]
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"what": 1}, "what"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"suffix": "x"}, "suffix"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [None]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "x"},
                            {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}},
                        ],
                    },
                ]
            },
            "messages[1].content[1].type",
        ),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {"65": 101}}, "logit_bias.65"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"logit_bias": {str(n): 1000 for n in range(1025)}}, "logit_bias"),
        ({f"x{n}": 1 for n in range(100)}, "x0"),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    error = refusal(live.http.post(CHAT, json={**ASK, **fields}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert live.backend.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ],
)
def test_completions_refuse_by_name_too(live: Live, fields: dict[str, Any], param: str) -> None:
    error = refusal(live.http.post(TEXT, json={**SAY, **fields}), 400)
    assert error["param"] == param
    assert live.backend.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": }',
        b"\xff\xfe",
        b'{"model": "tiny", "n": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
        b'"text"',
        b"[]",
        b"null",
        b"{}",
        b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"\\udc00":1}',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"stop":"\\udc00"}',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":Infinity}',
    ],
)
def test_a_body_that_is_no_json_object_is_refused(live: Live, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    refusal(live.http.post(CHAT, content=body, headers=headers), 400)
    assert live.backend.requests == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_415(live: Live, kind: str) -> None:
    body = json.dumps(ASK).encode()
    assert refusal(live.http.post(CHAT, content=body, headers={"Content-Type": kind}), 415)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/foo+json"])
def test_json_by_any_name_is_served(live: Live, kind: str) -> None:
    body = json.dumps(ASK).encode()
    answer = live.http.post(CHAT, content=body, headers={"Content-Type": kind})
    assert answer.status_code == 200


def too_long(chunk: bytes, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield chunk


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, "/v1/nothing"])
def test_a_body_over_8_mb_is_413_however_it_is_sent(live: Live, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    big = b" " * (MAX_BODY_BYTES + 1)
    if path == CHAT:
        refusal(live.http.post(path, content=too_long(b" " * 2**20, 9), headers=headers), 413)
    error = refusal(live.http.post(path, content=big, headers=headers), 413)
    assert error["code"] == "body_too_large"


def test_a_body_declared_far_too_long_is_refused_unread(live: Live) -> None:
    with socket.create_connection((live.host, live.port), timeout=5) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in raw.recv(4096).split(b"\r\n")[0]


def test_a_body_at_the_limit_reaches_the_route(live: Live) -> None:
    text = json.dumps(ASK).encode()
    body = text + b" " * (MAX_BODY_BYTES - len(text))
    answer = live.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


def test_routes_and_methods_that_do_not_exist(live: Live) -> None:
    assert refusal(live.http.get("/v1/nothing"), 404)["code"] == "route_not_found"
    answer = live.http.get(CHAT)
    assert refusal(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    assert live.http.get("/v1/models/").status_code == 404


@pytest.mark.parametrize(
    ("path", "shape"),
    [("/v1/messages", {"type", "error"}), ("/api/nothing", {"error"}), ("/x", {"error"})],
)
def test_an_error_has_the_shape_of_its_api(live: Live, path: str, shape: set[str]) -> None:
    body = live.http.post(path, json={}).json()
    assert set(body) == shape
    assert isinstance(body["error"], str) == (path == "/api/nothing")


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_is_unknown_loading_or_mute(live: Live, stream: bool) -> None:
    error = refusal(live.http.post(CHAT, json={**ASK, "model": "no", "stream": stream}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    answer = live.http.post(CHAT, json={**ASK, "model": "slow", "stream": stream})
    assert refusal(answer, 503)["type"] == "server_error"
    assert answer.headers["retry-after"] == "7"
    error = refusal(live.http.post(CHAT, json={**ASK, "model": "mute", "stream": stream}), 400)
    assert error["code"] == "no_chat_template"
    assert live.http.post(TEXT, json={**SAY, "model": "mute"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_a_status(live: Live, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "x" * CONTEXT_TOKENS}]
    with pytest.raises(openai.BadRequestError) as caught:
        live.openai.chat.completions.create(model=MODEL, messages=messages, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    ids = [65] * CONTEXT_TOKENS
    error = refusal(live.http.post(TEXT, json={**SAY, "prompt": ids, "stream": stream}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    answer = live.http.post(TEXT, json={**SAY, "prompt": ids[:-1]})
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_a_bug_is_a_500_without_details(live: Live) -> None:
    live.backend.open_error = RuntimeError("secret")
    answer = live.http.post(CHAT, json=ASK, headers={"X-Request-Id": "bug-1"})
    assert "bug-1" in refusal(answer, 500)["message"]
    assert "secret" not in answer.text
    live.backend.open_error = None
    assert live.http.post(CHAT, json=ASK).status_code == 200


@pytest.mark.parametrize(
    ("sent", "returned"),
    [("abc-1._Z", "abc-1._Z"), ("a\tb <c>", "abc"), ("x" * 100, "x" * 64), ("<>", None)],
)
def test_a_request_id_is_honoured_as_far_as_it_is_safe(
    live: Live, sent: str, returned: str | None
) -> None:
    answer = live.http.post(CHAT, json=ASK, headers={"X-Request-Id": sent})
    found = answer.headers["x-request-id"]
    assert found == returned if returned else len(found) == 16
    assert live.backend.requests[0].request_id == found


def test_no_origin_is_let_in(live: Live) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert live.http.options(CHAT, headers=headers).status_code == 405
    answer = live.http.post(CHAT, json=ASK, headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]
