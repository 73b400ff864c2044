"""Continuous batching under random arrivals, ends, cancellations and shortage of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.batch import Batch, Sequence, Work
from compute.page_table import PAGE_TOKENS
from compute.pages import Pages

ROOM = 4  # pages of the longest sequence


def batch(num_slots: int = 4, num_pages: int = 64, pages_a_slot: int = ROOM) -> Batch:
    return Batch(num_slots=num_slots, pages=Pages(num_pages), pages_a_slot=pages_a_slot)


def submit(b: Batch, key: int | str, length: int, fair_key: str = "", answer: int = 8) -> Sequence:
    """A sequence of tokens that no other key has."""
    base = 1000 * (ord(key[0]) if isinstance(key, str) else key)
    ids = list(range(base, base + length))
    return b.submit(key, ids, most_tokens=length + answer, fair_key=fair_key)


def plan(b: Batch, tokens: int = 256, beside: int = 256) -> list[Work]:
    """One step; every sequence that is complete gets a token."""
    work = b.plan(step_tokens=tokens, beside_tokens=beside)
    for w in work:
        if w.complete:
            b.extend(w.sequence.key, 7)
    return work


def spans(work: list[Work]) -> list[tuple[Hashable, int, int]]:
    return [(w.sequence.key, w.start, w.stop) for w in work]


def test_arrivals_get_slots_in_order_and_later_ones_wait() -> None:
    b = batch(num_slots=2)
    for key in "abc":
        submit(b, key, 3)
    assert spans(plan(b)) == [("a", 0, 3), ("b", 0, 3)]
    assert b.num_waiting == b.num_waiting_long == 1
    b.retire("a")
    assert spans(plan(b)) == [("b", 3, 4), ("c", 0, 3)]


def test_a_long_prompt_leaves_room_for_running_streams() -> None:
    b = batch()
    submit(b, "short", 2)
    plan(b)
    submit(b, "long", 20)
    steps = [spans(plan(b, tokens=100, beside=7)) for _ in range(3)]
    assert steps == [
        [("short", n, n + 1), ("long", *span)]
        for n, span in zip((2, 3, 4), ((0, 7), (7, 14), (14, 20)), strict=True)
    ]


def test_prefill_moves_on_even_where_decoding_takes_the_whole_budget() -> None:
    b = batch()
    for key in "abc":
        submit(b, key, 1)
    plan(b)
    submit(b, "d", 5)
    assert [w.stop - w.start for w in plan(b, tokens=3)] == [1, 1, 1, 1]


def test_short_prompts_do_not_wait_behind_long_ones_and_the_oldest_has_half() -> None:
    b = batch()
    submit(b, "long", 200)
    plan(b, tokens=16)
    for key, length in (("middle", 100), ("short", 5), ("tiny", 2)):
        submit(b, key, length)
    assert spans(plan(b, tokens=16)) == [
        ("long", 16, 24),
        ("tiny", 0, 2),
        ("short", 0, 5),
        ("middle", 0, 1),
    ]


def test_keys_take_turns_and_within_a_key_the_first_comes_first() -> None:
    b = batch(num_slots=1)
    for number in range(4):
        submit(b, number, 2, "greedy")
    for number in (10, 11):
        submit(b, number, 2, "modest")
    submit(b, 20, 2, "late")
    served = []
    while not b.idle:
        (work,) = plan(b)
        served.append(work.sequence.key)
        b.retire(work.sequence.key)
    assert served == [0, 10, 20, 1, 11, 2, 3]


def test_who_waits_can_leave() -> None:
    b = batch(num_slots=1)
    for key in "abc":
        submit(b, key, 2)
    plan(b)
    b.retire("b")
    b.retire("nobody")
    b.retire("a")
    assert spans(plan(b)) == [("c", 0, 2)]


def test_wrong_keys() -> None:
    b = batch()
    submit(b, "a", 1)
    with pytest.raises(ValueError, match="already"):
        submit(b, "a", 1)
    with pytest.raises(ValueError, match="no token"):
        b.submit("b", [], most_tokens=1)
    with pytest.raises(KeyError):
        b.extend("c", 1)
    with pytest.raises(ValueError, match="cannot hold 4"):
        batch(num_pages=3)


def text(length: int, seed: int = 0) -> list[int]:
    return [seed + number for number in range(length)]


def test_what_begins_alike_shares_pages_by_reference() -> None:
    b = batch()
    one = b.submit("one", [*text(150), 1, 2], most_tokens=200)
    plan(b)
    two = b.submit("two", [*text(150), 3], most_tokens=200)
    (_, work) = plan(b)
    assert (work.start, work.stop) == (128, 151)
    assert two.reused == b.reused_tokens == 128
    assert two.pages[:2] == one.pages[:2]
    assert set(two.pages[2:]).isdisjoint(one.pages)
    assert work.pages == tuple(two.pages)


def test_a_token_is_left_to_run() -> None:
    b = batch()
    for key in "ab":
        b.submit(key, text(128), most_tokens=200)
        plan(b)
    assert [s.reused for s in b.running] == [0, 64]


def test_answers_are_remembered_too_and_the_oldest_text_goes_first() -> None:
    b = batch(num_pages=ROOM)
    b.submit("one", text(60), most_tokens=100)
    for _ in range(6):  # fills the page with answer tokens
        plan(b)
    ids = [*b.running[0].ids]
    b.retire("one")
    b.submit("two", text(65, seed=500), most_tokens=66)
    plan(b)
    b.retire("two")
    again = b.submit("one", [*ids[:64], 1, 2], most_tokens=70)
    plan(b)
    assert again.reused == 64
    b.retire("one")
    b.submit("three", text(200, seed=900), most_tokens=201)  # needs all pages
    plan(b)
    b.retire("three")
    gone = b.submit("one", [*ids[:64], 1, 2], most_tokens=70)
    plan(b)
    assert gone.reused == 0


def test_prompts_that_come_together_run_what_they_share_once() -> None:
    b = batch()
    for key in range(4):
        b.submit(key, [*text(130), 1000 + key], most_tokens=140)
    ran = 0
    while not all(s.samples or s.left <= 1 for s in b.running) or not ran:
        work = b.plan(step_tokens=48, beside_tokens=48)
        assert sum(w.stop - w.start for w in work) <= 48
        ran += sum(w.stop - w.start for w in work)
        for w in work:
            if w.complete:
                b.retire(w.sequence.key)
    while not b.idle:
        for w in b.plan(step_tokens=48, beside_tokens=48):
            ran += w.stop - w.start
            b.retire(w.sequence.key) if w.complete else None
    assert ran == 131 + 3 * 3


def test_who_is_youngest_gives_its_memory_and_begins_anew() -> None:
    b = batch(num_slots=2, num_pages=5)
    for number in (0, 1):
        submit(b, number, 120, answer=130)
    plan(b)
    for _ in range(9):  # both would need a third page now
        work = plan(b)
    assert spans(work) == [(0, 128, 129)]
    assert (b.num_preempted, b.num_waiting, b.num_waiting_long) == (1, 1, 0)
    plan(b)
    assert b.num_waiting_long == 1  # there is a slot, and no memory
    b.retire(0)
    (again,) = plan(b)
    assert (again.sequence.key, again.stop) == (1, 129)
    assert again.start > 0  # its own pages were not all given away
    assert not again.first
    assert again.sequence.reused == 0  # a preemption is nothing that a client saved


class Model:
    """What must hold in every step, whatever comes and goes."""

    def __init__(self, b: Batch, memory: int) -> None:
        self.b = b
        self.held: list[tuple[int, ...] | None] = [None] * memory  # text before and in each page
        self.tables: dict[int, list[int]] = {}

    def plan(self, budget: int, depth: int) -> list[Work]:
        b = self.b
        streams = [s for s in b.running if s.decodes]
        work = b.plan(step_tokens=budget, beside_tokens=budget, depth=depth)
        decoding = sum(w.decodes for w in work)
        assert sum(len(w.ids) for w in work) - decoding <= max(1, budget - decoding)
        slots = [s.slot for s in b.running]
        assert len(set(slots)) == len(slots)
        if depth == 1:  # every running stream has a token in every step
            moved = {w.sequence.number for w in work}
            assert all(s.number in moved or s.slot < 0 for s in streams)
        for w in work:
            self.run(w)
        return work

    def run(self, w: Work) -> None:
        """Write and read pages as a stage would, by what rows say."""
        s = w.sequence
        table = self.tables.setdefault(s.slot, [-1] * ROOM)
        table[w.first_page : w.first_page + len(w.pages)] = w.pages
        assert tuple(s.ids[w.start : w.stop]) == w.ids
        for page in range(-(-w.stop // PAGE_TOKENS)):
            begin, end = page * PAGE_TOKENS, min((page + 1) * PAGE_TOKENS, w.stop)
            if end > w.start:
                self.held[table[page]] = tuple(s.ids[:end])
            held = self.held[table[page]]
            assert held is not None
            assert held[:end] == tuple(s.ids[:end]), "another's page"
            assert begin <= w.start or end > w.start


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_comes_and_goes(data: st.DataObject) -> None:
    """Nobody starves, nobody reads what another wrote unless it is the same text."""
    num_slots = data.draw(st.integers(1, 4), label="slots")
    num_pages = data.draw(st.integers(ROOM, 3 * ROOM), label="pages")
    budget = data.draw(st.integers(1, 150), label="budget")
    depth = data.draw(st.integers(1, 3), label="depth")
    b = batch(num_slots, num_pages)
    model = Model(b, num_pages)
    count = data.draw(st.integers(1, 7), label="requests")
    prompts, answers, arrivals, cancels = [], [], [], []
    for number in range(count):
        shared = data.draw(st.sampled_from([0, 40, 64, 130]))
        own = data.draw(st.integers(1, 70))
        answer = data.draw(st.integers(1, 50))
        prompts.append([*text(shared), *text(own, seed=1000 * number + 500)])
        answers.append(min(answer, ROOM * PAGE_TOKENS - len(prompts[-1])))
        arrivals.append(data.draw(st.integers(0, 8)))
        cancels.append(data.draw(st.none() | st.integers(0, 30)))
    key_of = [data.draw(st.sampled_from("ab")) for _ in range(count)]
    under_way: deque[list[Work]] = deque()
    order: dict[str, list[int]] = {"a": [], "b": []}
    gone: set[int] = set()
    for step in range(4000):
        for key, prompt in enumerate(prompts):
            if arrivals[key] == step:
                b.submit(
                    key,
                    [*prompt],
                    most_tokens=len(prompt) + answers[key],
                    fair_key=key_of[key],
                )
            if cancels[key] == step and arrivals[key] <= step:
                b.retire(key)
                gone.add(key)
        while len(under_way) < depth:
            work = model.plan(budget, depth)
            if not work:
                break
            under_way.append(work)
            for w in work:
                if w.first:
                    assert isinstance(w.sequence.key, int)
                    order[key_of[w.sequence.key]].append(w.sequence.key)
        if not under_way:
            if b.idle and step > 30:
                break
            assert b.idle or step < 30 or b.running
            continue
        for w in under_way.popleft():
            assert isinstance(w.sequence.key, int)
            key = w.sequence.key
            if not w.complete or key in gone:
                continue
            if len(w.sequence.ids) + 1 == len(prompts[key]) + answers[key]:
                b.retire(key)
                gone.add(key)
            else:
                b.extend(key, step % 3)
    assert b.idle
    assert b.pages.num_available == num_pages
    for served in order.values():  # rows of one step are not in the order of admission
        assert len(set(served)) == len(served)
