"""OpenAI's responses, asked by the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from control.backend import DoneEvent
from control.gateway.response_store import Kept, ResponseStore
from control.gateway.turn import Turn
from tests.control.gateway.fake_backend import CONTEXT_TOKENS, MODEL
from tests.control.gateway.live import Live

PATH = "/v1/responses"
LOGPROBS: Any = ["message.output_text.logprobs"]
OPENED, CLOSED = "<|im_start|>", "<|im_end|>\n"


def seen(live: Live) -> str:
    """The latest prompt as text, without the opening of the answer."""
    ids = live.backend.requests[-1].prompt_ids
    text = live.backend.tokenizer.decode(list(ids), skip_special=False)
    assert text.endswith(f"{OPENED}assistant\n")
    return text.removesuffix(f"{OPENED}assistant\n")


def turn(role: str, text: str) -> str:
    return f"{OPENED}{role}\n{text}{CLOSED}"


def test_answers_with_a_response_and_usage(live: Live) -> None:
    answer = live.openai.responses.create(
        model=MODEL,
        input="hi",
        instructions="Be brief.",
        max_output_tokens=50,
        temperature=0.25,
        top_p=0.5,
        metadata={"a": "b"},
        user="someone",
        truncation="disabled",
        text={"format": {"type": "text"}},
        tool_choice="none",
        extra_headers={"X-Request-Id": "abc-1"},
    )
    (sent,) = live.backend.requests
    assert (sent.max_tokens, sent.temperature, sent.top_p) == (50, 0.25, 0.5)
    assert sent.request_id == "abc-1"
    assert seen(live) == turn("system", "Be brief.") + turn("user", "hi")
    assert (answer.object, answer.status, answer.model) == ("response", "completed", MODEL)
    assert answer.output_text == "Hello there"
    assert answer.metadata == {"a": "b"}
    assert answer.error is None
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(sent.prompt_ids)
    assert answer.usage.output_tokens == len(live.backend.tokenizer.encode("Hello there"))
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_an_answer_cut_by_its_limit_is_incomplete(live: Live) -> None:
    answer = live.openai.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_goes_on_after_a_response_that_is_kept(live: Live) -> None:
    create = live.openai.responses.create
    first = create(model=MODEL, input="one", instructions="Only for the first.")
    live.backend.say = "again 🎉"
    for stream in (False, True):
        if stream:
            events = list(
                create(model=MODEL, input="two", previous_response_id=first.id, stream=True)
            )
            second: Any = events[-1]
            second = second.response
        else:
            second = create(model=MODEL, input="two", previous_response_id=first.id)
        before = turn("user", "one") + turn("assistant", "Hello there") + turn("user", "two")
        assert seen(live) == before
        assert second.previous_response_id == first.id
        create(model=MODEL, input="three", previous_response_id=second.id)
        assert seen(live) == before + turn("assistant", "again 🎉") + turn("user", "three")


def test_a_clients_own_list_of_output_items_is_a_conversation(live: Live) -> None:
    create = live.openai.responses.create
    first = create(model=MODEL, input="one", include=LOGPROBS)
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        *first.output,
        {"type": "message", "role": "user", "content": "two"},
    ]
    create(model=MODEL, input=items)
    assert seen(live) == (
        turn("system", "Be brief.")
        + turn("user", "one")
        + turn("assistant", "Hello there")
        + turn("user", "two")
    )


def test_a_kept_response_can_be_read_and_forgotten(live: Live) -> None:
    client = live.openai.responses
    kept = client.create(model=MODEL, input="hi")
    assert client.retrieve(kept.id) == kept
    client.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.retrieve(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.delete(kept.id)
    unkept = client.create(model=MODEL, input="hi", store=False)
    for gone in (kept.id, unkept.id):
        with pytest.raises(openai.BadRequestError) as caught:
            client.create(model=MODEL, input="hi", previous_response_id=gone)
        assert caught.value.code == "previous_response_not_found"
        assert caught.value.param == "previous_response_id"


@pytest.mark.parametrize(("limit", "last"), [(100, "completed"), (3, "incomplete")])
def test_the_sequence_of_events_is_openais(live: Live, limit: int, last: str) -> None:
    live.backend.say = "👩‍👩‍👧 the end"
    events: list[Any] = list(
        live.openai.responses.create(
            model=MODEL,
            input="hi",
            stream=True,
            max_output_tokens=limit,
            include=LOGPROBS,
            top_logprobs=1,
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", last]
    deltas = events[4:-4]
    assert {event.type for event in deltas} == {"response.output_text.delta"}
    text = "".join(event.delta for event in deltas)
    assert events[-4].text == text
    assert ("\ufffd" in text) == (limit == 3)  # a code point that the limit cut
    assert events[-1].response.output_text == text
    logprobs = [one.token for event in deltas for one in event.logprobs]
    assert len(logprobs) == events[-1].response.usage.output_tokens
    assert len({event.item_id for event in events[3:-2]}) == 1
    assert events[0].response.status == "in_progress"
    assert events[0].response.id == events[-1].response.id
    live.openai.responses.retrieve(events[-1].response.id)


def test_the_clients_own_stream_helper_reads_it(live: Live) -> None:
    with live.openai.responses.stream(model=MODEL, input="hi") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "Hello there"


def test_an_error_in_mid_stream_is_a_failed_response(live: Live) -> None:
    live.backend.fail_at, live.backend.failure = 3, DoneEvent("error", "rank 1 is lost")
    events: list[Any] = list(live.openai.responses.create(model=MODEL, input="hi", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].sequence_number == len(events) - 1
    assert events[-1].response.error.message == "rank 1 is lost"
    with pytest.raises(openai.NotFoundError):
        live.openai.responses.retrieve(events[-1].response.id)


def test_a_bug_in_mid_stream_keeps_its_details_to_the_log(live: Live) -> None:
    live.backend.fail_at = 2
    answer = live.http.post(
        PATH,
        json={"model": MODEL, "input": "x", "stream": True},
        headers={"X-Request-Id": "bug-7"},
    )
    assert "response.failed" in answer.text
    assert "bug-7" in answer.text
    assert "secret" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_a_status(live: Live, stream: bool) -> None:
    create = live.openai.responses.create
    with pytest.raises(openai.NotFoundError):
        create(model="no", input="x", stream=stream)
    with pytest.raises(openai.BadRequestError) as caught:
        create(model=MODEL, input="x" * CONTEXT_TOKENS, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    live.backend.fail_at, live.backend.failure = 0, DoneEvent("error", "no")
    with pytest.raises(openai.InternalServerError):
        create(model=MODEL, input="x", stream=stream)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"what": 1}, "what"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"tools": [{"type": "function", "name": "x"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "x"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": LOGPROBS, "top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"stream_options": {}}, "stream_options"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    answer = live.http.post(PATH, json={"model": MODEL, "input": "x", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert param in answer.json()["error"]["message"]
    assert live.backend.requests == []


def test_the_store_forgets_what_was_unused_for_longest() -> None:
    store = ResponseStore(max_kept=2, max_chars=100)
    small = Kept(b"{}", (Turn("user", "x" * 20),))
    store.put("a", small)
    store.put("b", small)
    assert store.get("a") is small
    store.put("c", small)
    assert [store.get(id) is small for id in "abc"] == [True, False, True]
    store.put("d", Kept(b"{}", (Turn("user", "x" * 90),)))
    assert [store.get(id) is None for id in "acd"] == [True, True, False]
    store.put("e", Kept(b"{}", (Turn("user", "x" * 99),)))
    assert store.get("e") is None
    assert (store.remove("d"), store.remove("d"), len(store)) == (True, False, 0)
    store.put("f", small)
    assert store.get("f") is small
