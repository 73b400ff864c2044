"""What steps took, and what follows for the next ones."""

from __future__ import annotations

import pytest

from compute.pace import LEAST_TOKENS, Pace


def test_prompts_get_what_streams_leave_of_a_step() -> None:
    pace = Pace(target_s=0.1, most_tokens=256)
    assert pace.beside_tokens() == LEAST_TOKENS  # nothing is known
    for _ in range(40):
        pace.ran(0.02, decodes=4, prefills=0)
        pace.ran(0.02 + 100 * 0.001, decodes=4, prefills=100)
    assert pace.beside_tokens() == pytest.approx(80, abs=2)
    assert pace.prompt_tokens_per_s == pytest.approx(1000, rel=0.02)
    for _ in range(40):
        pace.ran(0.5, decodes=4, prefills=0)
    assert pace.beside_tokens() == LEAST_TOKENS  # prompts must go on
    assert Pace(target_s=9.0, most_tokens=7).beside_tokens() == 7


def test_a_fast_engine_takes_all_it_may() -> None:
    pace = Pace(target_s=0.1, most_tokens=256)
    pace.ran(0.001, decodes=0, prefills=256)
    assert pace.beside_tokens() == 256
    assert pace.tokens_per_s == 0.0


def test_a_wait_is_told_by_the_latest_ends() -> None:
    pace = Pace(target_s=0.1, most_tokens=256)
    assert pace.wait_s(3, prompt_tokens=100, answer_tokens=10) == 0.0  # nothing is known
    pace.ran(1.0, decodes=0, prefills=100)
    pace.ran(0.5, decodes=2, prefills=0)
    assert pace.tokens_per_s == 4.0
    assert pace.wait_s(3, prompt_tokens=200, answer_tokens=10) == pytest.approx(2.0 + 5.0)
    for _ in range(50):
        pace.ran(1.0, decodes=2, prefills=0)
        pace.ended()
        pace.ended()
    assert pace.wait_s(6, prompt_tokens=200, answer_tokens=10) == pytest.approx(3.0, rel=0.05)
    assert pace.wait_s(0, prompt_tokens=200, answer_tokens=10) == 0.0
