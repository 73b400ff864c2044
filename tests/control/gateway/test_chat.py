"""Chat completions, asked by the official client of a gateway on a real socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from control.backend import DoneEvent, GenerateRequest
from control.errors import NotReady
from tests.control.gateway.fake_backend import CONTEXT_TOKENS, MODEL, TEMPLATE
from tests.control.gateway.live import Live

USER: list[Any] = [{"role": "user", "content": "Say hello"}]
ASK: dict[str, Any] = {"model": MODEL, "messages": USER}
# Between them: merges, a stop string's characters, a BMP script, emoji with joiners, line breaks
# that some clients' line readers also see, and a flag.
TEXTS = [
    "Hello there, the yellow one.",
    "héllo ẞ 漢字かな العربية",
    "👩‍👩‍👧‍👦 and 🇵🇱 end with 🎉",
    'quote " backslash \\ newline \n tab \t',
    "line\u2028para\u2029nel\x85end\r\n",
    "",
]


def stream_text(live: Live, **fields: Any) -> str:
    chunks = live.openai.chat.completions.create(**ASK, stream=True, **fields)
    return "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)


def test_answers_with_the_models_text_and_usage(live: Live) -> None:
    answer = live.openai.chat.completions.create(**ASK)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    prompt_ids = live.backend.requests[0].prompt_ids
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == len(live.backend.tokenizer.encode("Hello there"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_renders_the_conversation_with_the_models_template(live: Live) -> None:
    live.openai.chat.completions.create(
        model="default",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    )
    seen = live.backend.tokenizer.decode(live.backend.requests[0].prompt_ids, skip_special=False)
    assert "add_generation_prompt" in TEMPLATE
    assert seen == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_every_sampling_field_reaches_the_engine(live: Live) -> None:
    live.openai.chat.completions.create(
        **ASK,
        max_completion_tokens=7,
        temperature=0.25,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        seed=-1,
        logprobs=True,
        top_logprobs=3,
        user="someone",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={
            "logit_bias": {"65": -100, "66": 2.5},
            "top_k": 40,
            "min_p": 0.05,
            "stop": None,
            "tools": [],
            "what": None,
        },
        extra_headers={"X-Request-Id": "abc-1"},
    )
    (sent,) = live.backend.requests
    tokenizer = live.backend.tokenizer
    assert sent == GenerateRequest(
        model=MODEL,
        prompt_ids=sent.prompt_ids,
        max_tokens=7,
        temperature=0.25,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        logit_bias={65: -100.0, 66: 2.5},
        seed=2**64 - 1,
        logprobs=3,
        stop_ids=frozenset(tokenizer.eos_ids),
        request_id="abc-1",
    )


def test_without_max_tokens_the_answer_may_fill_the_context(live: Live) -> None:
    live.openai.chat.completions.create(**ASK)
    (sent,) = live.backend.requests
    assert sent.max_tokens == CONTEXT_TOKENS - len(sent.prompt_ids)


def test_max_tokens_beyond_the_room_is_clamped_and_ends_with_length(live: Live) -> None:
    live.backend.say = "x" * CONTEXT_TOKENS
    answer = live.openai.chat.completions.create(**ASK, max_tokens=100_000)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == CONTEXT_TOKENS


def test_unseeded_requests_differ_and_seeded_ones_do_not(live: Live) -> None:
    for seed in (None, None, 5, 5):
        live.openai.chat.completions.create(**ASK, seed=seed)
    seeds = [sent.seed for sent in live.backend.requests]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [5, 5]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_holds_the_same_text_as_a_whole_answer(live: Live, text: str) -> None:
    live.backend.say = text
    assert live.openai.chat.completions.create(**ASK).choices[0].message.content == text
    assert stream_text(live) == text


def test_stream_chunks_are_whole_code_points_and_survive_any_line_reader(live: Live) -> None:
    live.backend.say = TEXTS[2] + TEXTS[4]
    with live.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    pieces = [one["choices"][0]["delta"].get("content", "") for one in chunks]
    assert "".join(pieces) == live.backend.say
    assert "\ufffd" not in "".join(pieces)
    assert len({one["id"] for one in chunks}) == 1
    assert all("usage" not in one for one in chunks)


def test_include_usage_adds_one_last_chunk_without_choices(live: Live) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        live.openai.chat.completions.create(**ASK, stream=True, stream_options=options, n=2)
    )
    assert all(one.usage is None for one in chunks[:-1])
    assert chunks[-1].choices == []
    found = chunks[-1].usage
    assert found is not None
    assert found.completion_tokens == 2 * len(live.backend.tokenizer.encode("Hello there"))
    assert found.prompt_tokens == len(live.backend.requests[0].prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_run_with_seeds_of_their_own(live: Live, stream: bool) -> None:
    live.backend.say = lambda request: f"seed {request.seed} 🎉"
    texts = ["", "", ""]
    if stream:
        order = []
        for one in live.openai.chat.completions.create(**ASK, n=3, seed=40, stream=True):
            texts[one.choices[0].index] += one.choices[0].delta.content or ""
            order.append(one.choices[0].index)
        assert order != sorted(order), "the choices were sent one after the other"
    else:
        answer = live.openai.chat.completions.create(**ASK, n=3, seed=40)
        texts = [choice.message.content or "" for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert texts == ["seed 40 🎉", "seed 41 🎉", "seed 42 🎉"]
    assert len({sent.request_id for sent in live.backend.requests}) == 3


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("yellow", "Hello there, the "),
        (["zzz", "the y"], "Hello there, "),
        (["llo there, the ye", "here, t"], "Hello t"),
        (["🎉"], "Hello there, the yellow "),
        (["one."], "Hello there, the yellow 🎉 "),
        (["Hello"], ""),
        (["never"], "Hello there, the yellow 🎉 one."),
    ],
)
def test_stop_strings_end_the_answer_and_are_never_sent(
    live: Live, stop: str | list[str], left: str
) -> None:
    live.backend.say = "Hello there, the yellow 🎉 one."
    answer = live.openai.chat.completions.create(**ASK, stop=stop)
    assert answer.choices[0].message.content == left
    assert answer.choices[0].finish_reason == "stop"
    assert stream_text(live, stop=stop) == left
    for _ in range(2):
        live.backend.closed.get(timeout=2)
    assert live.backend.active == 0


def test_logprobs_name_each_token_with_its_bytes(live: Live) -> None:
    live.backend.say = "é the🎉"
    answer = live.openai.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    raw = b"".join(bytes(one.bytes or []) for one in found.content)
    assert raw.decode() == live.backend.say
    assert [one.token for one in found.content if one.token.isascii()] == [" the"]
    assert found.content[0].logprob == -9999.0
    assert all(one.logprob == -0.5 for one in found.content[1:])
    assert [len(one.top_logprobs) for one in found.content] == [2] * len(found.content)
    streamed: list[Any] = []
    for one in live.openai.chat.completions.create(
        **ASK, logprobs=True, top_logprobs=2, stream=True
    ):
        if one.choices[0].logprobs:
            streamed += one.choices[0].logprobs.content or []
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in found.content]


def test_logprobs_leave_out_the_tokens_of_a_stop_string(live: Live) -> None:
    live.backend.say = "ab the end"
    answer = live.openai.chat.completions.create(**ASK, logprobs=True, stop=" the")
    found = answer.choices[0].logprobs
    assert found is not None
    assert [one.token for one in found.content or []] == ["a", "b"]
    assert [one.top_logprobs for one in found.content or []] == [[], []]


def test_an_error_in_mid_stream_is_an_event_and_ends_the_stream(live: Live) -> None:
    live.backend.fail_at = 3
    live.backend.failure = DoneEvent("error", "rank 1 is lost for good")
    with pytest.raises(openai.APIError, match="rank 1 is lost for good"):
        stream_text(live)
    body = {**ASK, "stream": True}
    lines = [
        line for line in live.http.post("/v1/chat/completions", json=body).iter_lines() if line
    ]
    assert json.loads(lines[-1].removeprefix("data: ")) == {
        "error": {
            "message": "rank 1 is lost for good",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }


def test_a_bug_in_mid_stream_keeps_its_details_to_the_log(live: Live) -> None:
    live.backend.fail_at = 1
    answer = live.http.post(
        "/v1/chat/completions", json={**ASK, "stream": True}, headers={"X-Request-Id": "bug-7"}
    )
    assert answer.status_code == 200
    assert "bug-7" in answer.text
    assert "secret" not in answer.text
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (NotReady(MODEL, "it was unloaded"), 503),
        (DoneEvent("error", "no"), 500),
        (DoneEvent("cancelled"), 500),
        (RuntimeError("secret"), 500),
    ],
)
def test_an_error_before_the_first_token_is_a_status(
    live: Live, failure: Exception | DoneEvent, status: int, stream: bool
) -> None:
    live.backend.fail_at, live.backend.failure = 0, failure
    answer = live.http.post("/v1/chat/completions", json={**ASK, "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert ("retry-after" in answer.headers) == (status == 503)


def test_one_failing_choice_cancels_the_others(live: Live) -> None:
    live.backend.fail_at = 2
    with pytest.raises(openai.InternalServerError):
        live.openai.chat.completions.create(**ASK, n=4)
    for _ in range(4):
        live.backend.closed.get(timeout=2)
    assert live.backend.active == 0


@pytest.mark.parametrize("hold_at", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled_within_two_seconds(
    live: Live, stream: bool, hold_at: int
) -> None:
    live.backend.hold_at = hold_at
    before = live.metric("phalanx_requests_total", route="/v1/chat/completions", status="499")

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=10) as client:
            body = {**ASK, "stream": stream, "n": 2}
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            for _ in range(2):
                await asyncio.to_thread(live.backend.held.get, True, 5)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    for _ in range(2):
        live.backend.closed.get(timeout=2)
    assert live.backend.active == 0
    if not (stream and hold_at):
        now = live.metric("phalanx_requests_total", route="/v1/chat/completions", status="499")
        assert now == before + 1


def test_closing_the_official_clients_stream_cancels(live: Live) -> None:
    live.backend.hold_at = 5
    chunks = live.openai.chat.completions.create(**ASK, stream=True)
    next(chunks)
    chunks.close()
    live.backend.closed.get(timeout=2)


@pytest.mark.slow
def test_fifty_streams_at_once_keep_their_texts_apart(live: Live) -> None:
    live.backend.say = lambda request: f"{request.seed} 🎉 the yellow " * 5

    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        text = ""
        async for one in await client.chat.completions.create(**ASK, seed=seed, stream=True):
            text += one.choices[0].delta.content or ""
        return text

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30
        ) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(50)))

    assert asyncio.run(ask_all()) == [f"{seed} 🎉 the yellow " * 5 for seed in range(50)]
    assert live.backend.active == 0
