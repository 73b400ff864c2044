"""Continuous batching under random arrivals, ends and cancellations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute import batch


def test_arrivals_get_slots_in_order_and_later_ones_wait() -> None:
    state = batch.empty(2)
    for key in "abc":
        state = batch.submit(state, key, 3)
    work, state = batch.plan(state, step_tokens=100)
    assert [(w.key, w.slot, w.start, w.stop, w.complete) for w in work] == [
        ("a", 0, 0, 3, True),
        ("b", 1, 0, 3, True),
    ]
    assert [s.key for s in state.waiting] == ["c"]
    state = batch.retire(state, "a")
    work, state = batch.plan(batch.extend(state, "b"), step_tokens=100)
    assert [(w.key, w.slot, w.start, w.stop) for w in work] == [("b", 1, 3, 4), ("c", 0, 0, 3)]


def test_a_long_prompt_leaves_room_for_running_streams() -> None:
    state = batch.submit(batch.empty(2), "short", 2)
    _, state = batch.plan(state, step_tokens=8)
    state = batch.submit(batch.extend(state, "short"), "long", 20)
    seen: list[batch.Work] = []
    while not seen or not seen[-1].complete:
        work, state = batch.plan(state, step_tokens=8)
        assert work[0].key == "short"
        assert work[0].stop - work[0].start == 1
        assert sum(w.stop - w.start for w in work) <= 8
        seen.append(work[1])
        state = batch.extend(state, "short")
    assert [(w.start, w.stop) for w in seen] == [(0, 7), (7, 14), (14, 20)]


def test_prefill_moves_on_even_where_decoding_takes_the_whole_budget() -> None:
    state = batch.empty(4)
    for key in "abc":
        state = batch.submit(state, key, 1)
    _, state = batch.plan(state, step_tokens=3)
    for key in "abc":
        state = batch.extend(state, key)
    work, _ = batch.plan(batch.submit(state, "d", 5), step_tokens=3)
    assert [(w.key, w.stop - w.start) for w in work] == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]


def test_wrong_keys() -> None:
    state = batch.submit(batch.empty(1), "a", 1)
    with pytest.raises(ValueError, match="already"):
        batch.submit(state, "a", 1)
    with pytest.raises(ValueError, match="no token"):
        batch.submit(state, "b", 0)
    with pytest.raises(KeyError):
        batch.extend(state, "a")  # it waits
    assert batch.retire(state, "nobody") == state


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_slots=st.integers(1, 4), step_tokens=st.integers(1, 12))
def test_everybody_gets_every_position_once_and_nobody_starves(
    data: st.DataObject, num_slots: int, step_tokens: int
) -> None:
    """Random prompts and answer lengths; some are cancelled at a random step."""
    prompts = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=8), label="prompts")
    answers = [data.draw(st.integers(1, 6)) for _ in prompts]
    arrivals = [data.draw(st.integers(0, 10)) for _ in prompts]
    cancels = [data.draw(st.none() | st.integers(0, 15)) for _ in prompts]
    state = batch.empty(num_slots)
    next_position = dict.fromkeys(range(len(prompts)), 0)
    sampled = dict.fromkeys(range(len(prompts)), 0)
    first_served: list[int] = []
    gone: set[int] = set()
    for step in range(400):
        for key, length in enumerate(prompts):
            if arrivals[key] == step:
                state = batch.submit(state, key, length)
            if cancels[key] == step and arrivals[key] <= step:
                state = batch.retire(state, key)
                gone.add(key)
        idle_before = batch.is_idle(state)
        work, state = batch.plan(state, step_tokens=step_tokens)
        assert idle_before == (not work)  # whoever is there makes the batch move
        slots = [s.slot for s in state.running]
        assert len(set(slots)) == len(slots)
        assert sorted([*slots, *state.free_slots]) == list(range(num_slots))
        for w in work:
            assert isinstance(w.key, int)
            assert w.key not in gone
            assert w.start == next_position[w.key] < w.stop
            next_position[w.key] = w.stop
            if w.key not in first_served:
                first_served.append(w.key)
        moving = {w.key for w in work}
        for s in state.running:  # a decoding sequence moves in every step
            assert isinstance(s.key, int)
            assert s.key in moving or s.cached < prompts[s.key]
        for w in work:
            assert isinstance(w.key, int)
            if not w.complete:
                continue
            assert w.stop == prompts[w.key] + sampled[w.key]
            sampled[w.key] += 1
            if sampled[w.key] == answers[w.key]:
                state = batch.retire(state, w.key)
                gone.add(w.key)
            else:
                state = batch.extend(state, w.key)
    assert batch.is_idle(state)
    for key in range(len(prompts)):
        if cancels[key] is None:
            assert sampled[key] == answers[key]
    order = sorted(first_served, key=lambda key: (arrivals[key], key))
    assert first_served == order
