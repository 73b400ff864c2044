"""The sampler: each step by hand-made distributions, and the generator's independence."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.errors import BadLogits
from compute.sampler import SamplingParams, sample

Floats = npt.NDArray[np.float32]


def logits_of(*probabilities: float) -> Floats:
    return np.log(np.asarray(probabilities, dtype=np.float64)).astype(np.float32)


def drawn(logits: Floats, params: SamplingParams, times: int = 400) -> Counter[int]:
    return Counter(sample(logits, params, (), (), index).token_id for index in range(times))


FOUR = logits_of(0.5, 0.3, 0.15, 0.05)


def test_temperature_zero_takes_the_likeliest_and_the_lowest_id_on_ties() -> None:
    greedy = SamplingParams(temperature=0)
    assert sample(FOUR, greedy, (), (), 0).token_id == 0
    assert sample(np.zeros(5, np.float32), greedy, (), (), 0).token_id == 0


@pytest.mark.slow
def test_frequencies_follow_probabilities() -> None:
    counts = drawn(FOUR, SamplingParams(seed=3), times=4000)
    for token_id, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert counts[token_id] / 4000 == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_k=9), {0, 1, 2, 3}),
        (SamplingParams(top_p=0.5), {0}),
        (SamplingParams(top_p=0.51), {0, 1}),
        (SamplingParams(top_p=0.9), {0, 1, 2}),
        (SamplingParams(min_p=0.5), {0, 1}),
        (SamplingParams(min_p=1.0), {0}),
        (SamplingParams(top_k=3, top_p=0.8), {0, 1}),  # of what top-k left: 0.53, 0.84, 1
        (SamplingParams(temperature=2.0, top_p=0.5), {0, 1}),
        (SamplingParams(logit_bias={0: -100.0}), {1, 2, 3}),
        (SamplingParams(logit_bias={3: 100.0}), {3}),
    ],
)
def test_what_is_kept(params: SamplingParams, kept: set[int]) -> None:
    assert set(drawn(FOUR, params)) == kept


def test_penalties_count_generated_tokens() -> None:
    logits = np.array([1.0, 0.9, 0.0], dtype=np.float32)
    greedy = SamplingParams(temperature=0)

    def after(generated: tuple[int, ...], **penalties: float) -> int:
        params = replace(greedy, **penalties)  # type: ignore[arg-type]
        return sample(logits, params, (0, 0, 0), generated, len(generated)).token_id

    assert after((), presence_penalty=2.0) == 0  # the prompt does not count
    assert after((0,), presence_penalty=0.05) == 0
    assert after((0,), presence_penalty=0.2) == 1
    assert after((0,), frequency_penalty=0.06) == 0
    assert after((0, 0), frequency_penalty=0.06) == 1
    assert after((1,), presence_penalty=-0.2) == 1
    assert after((), repetition_penalty=2.0) == 1  # the prompt does count


def test_a_repeated_negative_logit_falls() -> None:
    logits = np.array([-1.0, -1.5], dtype=np.float32)
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert sample(logits, params, (0,), (), 1).token_id == 1


def test_logprobs_are_of_the_raw_distribution() -> None:
    params = SamplingParams(temperature=0, logit_bias={3: 50.0})
    found = sample(FOUR, params, (), (), 0, logprobs=2)
    assert found.token_id == 3
    assert found.logprob == pytest.approx(np.log(0.05), abs=1e-5)
    assert [token_id for token_id, _ in found.top] == [0, 1]
    assert found.top[0][1] == pytest.approx(np.log(0.5), abs=1e-5)
    none = sample(FOUR, params, (), (), 0)
    assert np.isnan(none.logprob)
    assert none.top == []
    assert len(sample(FOUR, params, (), (), 0, logprobs=20).top) == 4
    assert sample(FOUR, params, (), (), 0, logprobs=0).top == []


def test_top_ties_come_in_order_of_ids() -> None:
    flat = np.zeros(6, dtype=np.float32)
    top = sample(flat, SamplingParams(temperature=0), (), (), 0, logprobs=6).top
    assert [token_id for token_id, _ in top] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "logits",
    [
        np.array([0.0, np.nan, 1.0], dtype=np.float32),
        np.array([0.0, np.inf], dtype=np.float32),
        np.array([-np.inf, -np.inf], dtype=np.float32),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error(logits: Floats, temperature: float) -> None:
    with pytest.raises(BadLogits, match="no usable logits"):
        sample(logits, SamplingParams(temperature=temperature), (), (), 0)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], dtype=np.float32)
    assert set(drawn(logits, SamplingParams())) == {1, 3}


@pytest.mark.parametrize("token_id", [-1, 4])
def test_a_bias_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        sample(FOUR, SamplingParams(logit_bias={token_id: 1.0}), (), (), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_values_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        SamplingParams(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(deadline=None)
@given(
    seed=st.integers(-(2**70), 2**70),
    index=st.integers(0, 2**40),
    temperature=st.floats(0.01, 5),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1),
)
def test_a_draw_is_a_pure_function_that_keeps_its_input(
    seed: int, index: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.random.default_rng(index % 7).standard_normal(64).astype(np.float32)
    before = logits.copy()
    params = SamplingParams(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    first = sample(logits, params, (1, 2), (3,), index)
    sample(logits, SamplingParams(seed=seed + 1), (1,), (), index + 1)
    assert sample(logits, params, (1, 2), (3,), index).token_id == first.token_id
    assert np.array_equal(logits, before)


def test_seeds_and_positions_give_different_numbers() -> None:
    flat = np.zeros(10_000, dtype=np.float32)
    ids = {
        sample(flat, SamplingParams(seed=seed), (), (), index).token_id
        for seed in range(20)
        for index in range(20)
    }
    assert len(ids) > 380
