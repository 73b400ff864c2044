"""Text from token events, without a server: tables and properties."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.backend import FinishReason, TokenEvent
from control.gateway.generation_text import (
    AnswerText,
    Delta,
    StopScanner,
    chat_logprobs,
    completion_logprobs,
)
from tests.control.gateway.fake_backend import byte_tokenizer

TOKENIZER = byte_tokenizer()


def run(
    ids: Sequence[int], stops: tuple[str, ...], reason: FinishReason = "stop"
) -> tuple[list[Delta], FinishReason, AnswerText]:
    answer = AnswerText(TOKENIZER.stream(), stops)
    deltas = []
    for index, token_id in enumerate(ids):
        deltas.append(answer.push(TokenEvent(index, token_id)))
        if answer.stopped:
            break
    last, finish = answer.finish(reason)
    return [*deltas, last], finish, answer


def cut(text: str, stops: tuple[str, ...]) -> str:
    """What is left of ``text``, said in the plainest way: the stop completed first ends it."""
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return text


SMALL = st.text("abé🎉 \n", max_size=24)
STOPS = st.lists(st.text("abé🎉 ", min_size=1, max_size=4), max_size=4).map(tuple)


@given(text=SMALL, stops=STOPS)
def test_deltas_join_to_the_text_before_the_first_stop(text: str, stops: tuple[str, ...]) -> None:
    deltas, finish, answer = run(TOKENIZER.encode(text), stops, "length")
    left = cut(text, stops)
    assert "".join(delta.text for delta in deltas) == left
    assert answer.stopped == (left != text)
    assert finish == ("stop" if answer.stopped else "length")


@given(text=SMALL, stops=STOPS)
def test_nothing_that_was_given_out_is_ever_taken_back(text: str, stops: tuple[str, ...]) -> None:
    given_out = ""
    for delta in run(TOKENIZER.encode(text), stops)[0]:
        given_out += delta.text
        assert cut(text, stops).startswith(given_out)
        delta.text.encode()  # a lone half of a code point would not encode


@given(text=SMALL, stops=STOPS)
def test_tokens_are_given_out_once_in_order_and_begin_inside_the_text(
    text: str, stops: tuple[str, ...]
) -> None:
    deltas, _, answer = run(TOKENIZER.encode(text), stops)
    whole = Delta.join(deltas)
    assert [event.index for event in whole.tokens] == list(range(len(whole.tokens)))
    assert list(whole.starts) == sorted(whole.starts)
    assert all(start < len(whole.text) for start in whole.starts)
    if not answer.stopped:
        assert len(whole.tokens) == answer.num_tokens
        raw = b"".join(TOKENIZER.token_bytes(event.token_id) for event in whole.tokens)
        assert raw.decode() == text


@given(pieces=st.lists(st.text("ab", max_size=5)), stops=STOPS)
def test_the_scanner_does_not_care_how_text_is_cut(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    scanner, fed = StopScanner(stops), ""
    for piece in pieces:
        found = scanner.feed(piece)
        if found is not None:
            end, length = found
            assert (fed + piece[:end])[: len(fed) + end - length] == cut(fed + piece, stops)
            return
        fed += piece
        longest = max(
            (n for stop in stops for n in range(len(stop)) if fed.endswith(stop[:n])), default=0
        )
        assert scanner.num_pending == longest
    assert cut(fed, stops) == fed


def test_an_answer_cut_inside_a_character_ends_with_one_replacement() -> None:
    ids = TOKENIZER.encode("a🎉")
    deltas, finish, _ = run(ids[:3], (), "length")
    whole = Delta.join(deltas)
    assert whole.text == "a\ufffd"
    assert finish == "length"
    assert len(whole.tokens) == 3


def test_events_after_a_stop_string_add_nothing() -> None:
    answer = AnswerText(TOKENIZER.stream(), ("b",))
    for index, token_id in enumerate(TOKENIZER.encode("abc")):
        answer.push(TokenEvent(index, token_id))
    assert answer.num_tokens == 2
    assert answer.finish("length") == (Delta(), "stop")


def test_logprobs_of_a_split_character_keep_its_bytes() -> None:
    ids = TOKENIZER.encode("é")
    events = [TokenEvent(n, one, -1.0, ((one, -1.0),)) for n, one in enumerate(ids)]
    shown = chat_logprobs(events, TOKENIZER)
    assert [one["bytes"] for one in shown["content"]] == [[0xC3], [0xA9]]
    assert shown["refusal"] is None
    delta = Delta("é", tuple(events), (0, 0))
    assert completion_logprobs(delta, TOKENIZER) == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"bytes:\\xc3": -1.0}, {"bytes:\\xa9": -1.0}],
        "text_offset": [0, 0],
    }


@pytest.mark.parametrize("logprob", [None, float("-inf"), -1e9])
def test_a_logprob_is_always_a_number_json_can_hold(logprob: float | None) -> None:
    (shown,) = chat_logprobs([TokenEvent(0, 65, logprob)], TOKENIZER)["content"]
    assert shown["logprob"] == -9999.0
