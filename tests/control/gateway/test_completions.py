"""Text completions, asked by the official client."""

from __future__ import annotations

from typing import Any

import pytest

from control.gateway import prompts
from tests.control.gateway.fake_backend import CONTEXT_TOKENS, MODEL, FakeBackend, byte_tokenizer
from tests.control.gateway.live import Live, serve


def test_goes_on_from_a_text(live: Live) -> None:
    answer = live.openai.completions.create(model=MODEL, prompt="Say the")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "Hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    (sent,) = live.backend.requests
    assert answer.usage.prompt_tokens == len(sent.prompt_ids)
    assert live.backend.tokenizer.decode(sent.prompt_ids) == "Say the"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "echoes"),
    [
        ("one 🎉", ["one 🎉"]),
        (["one", "two"], ["one", "two"]),
        ([65, 66], None),
        ([[65], [66, 67]], None),
    ],
)
def test_prompts_may_be_texts_or_ids_alone_or_in_lists(
    live: Live, prompt: Any, echoes: list[str] | None, stream: bool
) -> None:
    live.backend.say = lambda request: f"[{request.seed}]"
    ids = [prompt] if prompt == [65, 66] else prompt
    wanted = echoes or [live.backend.tokenizer.decode(one) for one in ids]
    fields: dict[str, Any] = {"model": MODEL, "prompt": prompt, "n": 2, "seed": 7, "echo": True}
    texts = [""] * (2 * len(wanted))
    if stream:
        for one in live.openai.completions.create(**fields, stream=True):
            texts[one.choices[0].index] += one.choices[0].text
    else:
        answer = live.openai.completions.create(**fields)
        texts = [choice.text for choice in answer.choices]
        assert answer.usage is not None
        sent = live.backend.requests
        assert answer.usage.prompt_tokens == sum(len(one.prompt_ids) for one in sent) // 2
    assert texts == [f"{text}[{seed}]" for text in wanted for seed in (7, 8)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_older_shape(live: Live, stream: bool) -> None:
    live.backend.say = "é the"
    fields: dict[str, Any] = {"model": MODEL, "prompt": "x", "logprobs": 1, "temperature": 0}
    tokens: list[str] = []
    offsets: list[int] = []
    if stream:
        for one in live.openai.completions.create(**fields, stream=True):
            if one.choices[0].logprobs:
                tokens += one.choices[0].logprobs.tokens or []
                offsets += one.choices[0].logprobs.text_offset or []
    else:
        found = live.openai.completions.create(**fields).choices[0].logprobs
        assert found is not None
        tokens, offsets = found.tokens or [], found.text_offset or []
        assert found.token_logprobs == [-9999.0, -0.5, -0.5]
    assert tokens == ["bytes:\\xc3", "bytes:\\xa9", " the"]
    assert offsets == [0, 0, 1]


def test_usage_comes_last_in_a_stream_that_asks_for_it(live: Live) -> None:
    chunks = list(
        live.openai.completions.create(
            model=MODEL, prompt="x", stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 1
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_a_text_begins_with_bos_where_the_model_wants_it() -> None:
    backend = FakeBackend(byte_tokenizer(add_bos=True))
    with serve(backend) as live:
        live.openai.completions.create(model=MODEL, prompt=["a", "bc"])
        live.openai.completions.create(model=MODEL, prompt=[65])
    bos = backend.tokenizer.bos_id
    assert [one.prompt_ids[0] == bos for one in backend.requests] == [True, True, False]
    assert [len(one.prompt_ids) for one in backend.requests] == [2, 3, 1]


@pytest.mark.parametrize("size", [CONTEXT_TOKENS, CONTEXT_TOKENS * prompts.LONGEST_TOKEN_CHARS])
def test_a_long_text_is_refused_and_a_hopeless_one_is_not_even_encoded(
    live: Live, size: int
) -> None:
    answer = live.http.post("/v1/completions", json={"model": MODEL, "prompt": "x" * size})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert f"at least {CONTEXT_TOKENS}." in answer.json()["error"]["message"]
