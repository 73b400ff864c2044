"""The official clients of OpenAI, Anthropic and Ollama, against a node with the default model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from tests.cluster.live_node import LiveNode
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
USER: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
COUNT: list[Any] = [{"role": "user", "content": "Count from one to five."}]
EMOJI: list[Any] = [{"role": "user", "content": "Repeat exactly: 🎉👩‍👩‍👧 漢字"}]
GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def by_openai(shared_node: LiveNode) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{shared_node.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module")
def by_anthropic(shared_node: LiveNode) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=shared_node.url, api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module")
def by_ollama(shared_node: LiveNode) -> Iterator[ollama.Client]:
    with ollama.Client(host=shared_node.url, timeout=60) as client:
        yield client


# -- OpenAI --------------------------------------------------------------------------------


def greedy(client: openai.OpenAI, messages: list[Any], max_tokens: int = 24) -> str:
    """What every API must answer."""
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=max_tokens, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_choices_have_seeds_of_their_own_and_come_again(by_openai: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": COUNT, "n": 3, "seed": 7, "max_tokens": 12}
    texts = [one.message.content for one in by_openai.chat.completions.create(**ask).choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    used = None
    for chunk in by_openai.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
        used = chunk.usage
    assert streamed == texts
    assert used is not None
    assert used.completion_tokens <= 36


def test_completions_echo_lists_and_token_ids(by_openai: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "temperature": 0, "echo": True}
    texts = ["The capital of France is", "One two three"]
    answer = by_openai.completions.create(prompt=texts, **ask)
    assert [one.text.startswith(text) for one, text in zip(answer.choices, texts, strict=True)]
    assert "Paris" in answer.choices[0].text
    by_ids = by_openai.completions.create(prompt=[504, 3575, 282, 4649, 314], **ask)
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 5
    again = by_openai.completions.create(prompt=[[504, 3575, 282, 4649, 314]] * 2, **ask)
    assert [one.text for one in again.choices] == [by_ids.choices[0].text] * 2


def test_a_stop_that_spans_tokens_and_logprobs(by_openai: openai.OpenAI) -> None:
    whole = greedy(by_openai, USER)
    assert "of France is" in whole
    answer = by_openai.chat.completions.create(
        model=MODEL,
        messages=USER,
        max_tokens=24,
        temperature=0,
        stop=["l of Fr"],
        logprobs=True,
        top_logprobs=3,
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (whole.split("l of Fr")[0], "stop")
    assert choice.logprobs is not None
    for one in choice.logprobs.content or []:
        best = one.top_logprobs[0]
        assert (best.token, best.logprob) == (one.token, one.logprob), "greedy takes the likeliest"
        assert len(one.top_logprobs) == 3
    older = by_openai.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=2, temperature=0, logprobs=2
    )
    found = older.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == older.choices[0].text
    assert [len(one) for one in found.top_logprobs or []] == [2, 2]


def test_no_stream_splits_a_code_point(
    by_openai: openai.OpenAI, by_ollama: ollama.Client, by_anthropic: anthropic.Anthropic
) -> None:
    whole = greedy(by_openai, EMOJI)
    assert any(ord(char) > 0xFFFF for char in whole), whole
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in by_openai.chat.completions.create(
            model=MODEL, messages=EMOJI, max_tokens=24, temperature=0, stream=True
        )
    ]
    lines = by_ollama.chat(
        MODEL, messages=EMOJI, stream=True, options={"temperature": 0, "num_predict": 24}
    )
    with by_anthropic.messages.stream(
        model=MODEL, messages=EMOJI, max_tokens=24, extra_body=GREEDY
    ) as stream:
        deltas = list(stream.text_stream)
    for found in (pieces, [line.message.content or "" for line in lines], deltas):
        assert "".join(found) == whole
        assert all("\ufffd" not in piece for piece in found[:-2])


def test_responses_go_on_with_a_conversation(by_openai: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "default", "max_output_tokens": 24, "temperature": 0}
    first = by_openai.responses.create(input=USER[0]["content"], **ask)
    assert first.output_text == greedy(by_openai, USER)
    follow = "And of Italy?"
    second = by_openai.responses.create(input=follow, previous_response_id=first.id, **ask)
    turns = [
        *USER,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": follow},
    ]
    assert second.output_text == greedy(by_openai, turns)
    with by_openai.responses.stream(input=follow, previous_response_id=first.id, **ask) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == second.output_text
    assert final.usage == second.usage
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


# -- Anthropic -----------------------------------------------------------------------------


def test_messages_answer_what_a_chat_answers(
    by_openai: openai.OpenAI, by_anthropic: anthropic.Anthropic
) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 24}
    answer = by_anthropic.messages.create(**ask, extra_body=GREEDY)
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == greedy(by_openai, USER)
    assert answer.stop_reason == "end_turn"
    counted = by_anthropic.messages.count_tokens(model=MODEL, messages=USER)
    assert counted.input_tokens == answer.usage.input_tokens
    with by_anthropic.messages.stream(**ask, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].type == "text"
    assert (final.content[0].text, final.usage) == (block.text, answer.usage)
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_messages_stop_go_on_and_keep_to_their_limit(by_anthropic: anthropic.Anthropic) -> None:
    create = by_anthropic.messages.create
    ask: dict[str, Any] = {"model": MODEL, "extra_body": GREEDY}
    stopped = create(**ask, messages=USER, max_tokens=24, stop_sequences=["France"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "France")
    begun: Any = {"role": "assistant", "content": "The capital of France is"}
    went_on = create(**ask, messages=[*USER, begun], max_tokens=3)
    assert went_on.content[0].type == "text"
    assert went_on.content[0].text.startswith(" Paris")
    short = create(**ask, messages=COUNT, max_tokens=3, system="Be brief.")
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)


def test_messages_refuse_in_the_clients_own_classes(by_anthropic: anthropic.Anthropic) -> None:
    create = by_anthropic.messages.create
    with pytest.raises(anthropic.NotFoundError):
        create(model="nonesuch", messages=USER, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="context_length_exceeded"):
        create(
            model=MODEL,
            messages=[{"role": "user", "content": "word " * 9000}],
            max_tokens=1,
            stream=True,
        )
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        create(
            model=MODEL,
            messages=USER,
            max_tokens=1,
            tools=[{"name": "x", "input_schema": {"type": "object"}}],
        )


# -- Ollama --------------------------------------------------------------------------------


def test_ollama_answers_what_a_chat_answers(
    by_openai: openai.OpenAI, by_ollama: ollama.Client
) -> None:
    options = {"temperature": 0, "num_predict": 24}
    whole = greedy(by_openai, USER)
    answer = by_ollama.chat(MODEL, messages=USER, options=options)
    assert (answer.message.content, answer.done_reason) == (whole, "stop")
    prompt = USER[0]["content"]
    lines = list(by_ollama.generate(f"{MODEL}:latest", prompt, options=options, stream=True))
    assert "".join(line.response or "" for line in lines) == whole
    last = lines[-1]
    assert (last.done, last.eval_count) == (True, answer.eval_count)
    assert (last.prompt_eval_duration or 0) > 0
    assert (last.eval_duration or 0) > 0
    raw = by_ollama.generate(MODEL, "The capital of France is", raw=True, options=options)
    assert (raw.response or "").startswith(" Paris")


def test_ollama_lists_shows_and_says_what_runs(by_ollama: ollama.Client) -> None:
    assert MODEL in [one.model for one in by_ollama.list().models]
    (running,) = by_ollama.ps().models
    assert running.model == MODEL
    assert (running.size or 0) > 50e6
    assert running.size_vram == 0
    shown = by_ollama.show(MODEL)
    assert "im_start" in (shown.template or "")
    assert (shown.modelinfo or {})["llama.context_length"] == 8192
    assert by_ollama.generate(MODEL).done_reason == "load"


def test_ollama_pulls_what_is_here_and_deletes_nothing_that_runs(by_ollama: ollama.Client) -> None:
    lines = [line.status for line in by_ollama.pull(MODEL, stream=True)]
    assert (lines[0], lines[-1]) == ("pulling manifest", "success")
    assert by_ollama.pull(MODEL).status == "success"
    for refused, status in (("nonesuch", 404), (MODEL, 400)):
        with pytest.raises(ollama.ResponseError) as caught:
            by_ollama.delete(refused)
        assert caught.value.status_code == status
    with pytest.raises(ollama.ResponseError) as caught:
        list(by_ollama.pull("nonesuch", stream=True))
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="embeddings"):
        by_ollama.embed(MODEL, "x")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "Tell me a long story about a fox."}),
        ("/v1/messages", {"messages": COUNT, "max_tokens": 5000}),
        ("/api/generate", {"prompt": "Once upon a time", "raw": True}),
    ],
)
def test_a_client_that_leaves_is_out_within_two_seconds(
    shared_node: LiveNode, path: str, body: dict[str, Any]
) -> None:
    ask = {"model": MODEL, "stream": True, **body}
    with httpx.stream("POST", f"{shared_node.url}{path}", json=ask, timeout=30) as response:
        lines = response.iter_lines()  # kept: httpx closes the response with its iterator
        next(lines)
    wait_until(lambda: shared_node.instance()["active_requests"] == 0, 2.0)
