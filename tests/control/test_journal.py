"""The journal: an index makes a token idempotent, and a hopeless request ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.backend import GenerateRequest, TokenEvent
from control.journal import MAX_ATTEMPTS_WITHOUT_TOKEN, Entry, Journal, LostToken

REQUEST = GenerateRequest(model="m", prompt_ids=(1, 2), max_tokens=10)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_tokens_sent_again_change_nothing(restarts: list[int]) -> None:
    """Whatever overlap the replays have, the record is each token once, in order."""
    entry = Entry(REQUEST)
    seen = []
    for back in restarts:
        start = max(0, len(entry.tokens) - back)
        for index in range(start, start + 3):
            event = TokenEvent(index, 100 + index)
            if entry.accept(event):
                seen.append(index)
    assert seen == list(range(len(seen)))
    assert entry.tokens == [100 + index for index in seen]


def test_a_gap_is_an_error_with_both_numbers() -> None:
    entry = Entry(REQUEST)
    entry.accept(TokenEvent(0, 5))
    with pytest.raises(LostToken, match="token 2 arrived where token 1 was due"):
        entry.accept(TokenEvent(2, 5))


def test_attempts_without_a_token_are_limited_and_a_token_renews_them() -> None:
    entry = Entry(REQUEST)
    for _ in range(2):
        for _ in range(MAX_ATTEMPTS_WITHOUT_TOKEN):
            assert entry.begin_attempt()
            entry.suspect()
        refused, attempts = not entry.begin_attempt(), entry.attempts
        entry.accept(TokenEvent(len(entry.tokens), 5))
        assert refused
    entry = Entry(REQUEST, attempts=attempts)
    assert entry.begin_attempt()
    entry.attempts -= 1
    assert entry.attempts == 2 * MAX_ATTEMPTS_WITHOUT_TOKEN


def test_closed_entries_are_gone() -> None:
    journal = Journal()
    first, _ = journal.open(REQUEST)
    _, second = journal.open(REQUEST)
    journal.close(first)
    assert list(journal) == [second]
    assert len(journal) == 1
