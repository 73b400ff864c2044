"""The worker on an engine made of arithmetic: what comes out, in which order, and how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.engine import Row, check_rows
from compute.page_table import PAGE_TOKENS, PageTable
from compute.sampler import SamplingParams
from compute.worker import Done, Event, Submit, Token, Worker
from models.spec import ModelSpec, RopeSpec

VOCAB = 50
SPEC = ModelSpec(
    family="llama",
    num_layers=1,
    hidden_size=16,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    ffn_size=16,
    vocab_size=VOCAB,
    context_length=64,
    norm_eps=1e-5,
    rope=RopeSpec(theta=1e4, dim=16),
    windows=(None,),
    attention_scale=0.25,
)
POISON = 49  # a sequence with this token gets NaN


class SumEngine:
    """Favours the token ``sum of all ids so far, modulo 40``; its memory holds the ids."""

    spec = SPEC

    def __init__(
        self,
        *,
        context_tokens: int = 32,
        num_sequences: int = 2,
        num_pages: int = 0,
        depth: int = 1,
    ) -> None:
        self.context_tokens, self.num_sequences, self.depth = context_tokens, num_sequences, depth
        pages_a_slot = -(-context_tokens // PAGE_TOKENS)
        self.num_pages = num_pages or num_sequences * pages_a_slot
        self.under_way: deque[Sequence[Row]] = deque()
        self.most_under_way = 0
        self.memory = np.full(self.num_pages * PAGE_TOKENS, -1)
        self.table = PageTable(
            pages_a_slot=pages_a_slot, num_slots=num_sequences, num_pages=self.num_pages
        )
        self.table.numbers[:] = -1  # until the worker says otherwise
        self.largest_step = 0
        self.positions = 0  # run so far

    def start(self, rows: Sequence[Row]) -> None:
        self.under_way.append(rows)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        assert len(self.under_way) <= self.depth

    def finish(self) -> npt.NDArray[np.float32]:
        rows = self.under_way.popleft()
        check_rows(
            rows,
            num_sequences=self.num_sequences,
            context_tokens=self.context_tokens,
            vocab_size=VOCAB,
        )
        size = sum(len(row.ids) for row in rows)
        self.positions += size
        self.largest_step = max(self.largest_step, size)
        logits = []
        for row in rows:  # one after the other, as where a step is cut into parts
            self.table.follow([row])
            stop = row.start + len(row.ids)
            self.memory[self.table.places(row.slot, row.start, stop)] = row.ids
            held = self.memory[self.table.places(row.slot, 0, stop)]
            assert self.table.numbers[row.slot, : -(-stop // PAGE_TOKENS)].min() >= 0
            assert held.min() >= 0, "a position was left out"
            if row.want_logits:
                favourite = np.zeros(VOCAB, dtype=np.float32)
                favourite[held.sum() % 40] = 5.0
                logits.append(favourite + (np.nan if POISON in held else 0))
        return np.asarray(logits, dtype=np.float32).reshape(-1, VOCAB)

    def close(self) -> None:
        """Nothing to free."""


GREEDY = SamplingParams(temperature=0)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(sum(ids) % 40)
    return ids[len(prompt) :]


def order(key: Hashable, prompt: Sequence[int], **more: object) -> Submit:
    given_fields = {"max_tokens": 5, "params": GREEDY} | more
    return Submit(request_id=key, prompt_ids=tuple(prompt), **given_fields)  # type: ignore[arg-type]


def run(worker: Worker) -> dict[Hashable, list[Event]]:
    out: dict[Hashable, list[Event]] = {}
    while not worker.idle:
        for event in worker.step():
            out.setdefault(event.request_id, []).append(event)
    return out


def tokens(events: list[Event]) -> list[int]:
    found = [event for event in events if isinstance(event, Token)]
    first = found[0].index if found else 0
    assert [token.index for token in found] == list(range(first, first + len(found)))
    return [token.token_id for token in found]


def test_more_requests_than_slots_all_get_their_own_answers() -> None:
    engine = SumEngine()
    worker = Worker(engine, prefill_chunk_tokens=4)
    prompts = {key: list(range(key, key + 2 + key)) for key in range(5)}
    for key, prompt in prompts.items():
        worker.submit(order(key, prompt))
    assert (worker.num_running, worker.num_waiting) == (0, 5)
    out = run(worker)
    assert worker.step() == []
    for key, prompt in prompts.items():
        assert tokens(out[key]) == expected(prompt, 5)
        assert out[key][-1] == Done(key, "length")
    assert engine.largest_step <= 4 + 1


def test_all_stages_of_a_pipeline_have_a_step_under_way() -> None:
    engine = SumEngine(num_sequences=4, depth=2)
    worker = Worker(engine, prefill_chunk_tokens=4)
    prompts = {key: [key, key + 1] for key in range(4)}
    for key, prompt in prompts.items():
        worker.submit(order(key, prompt, max_tokens=9))
    out: dict[Hashable, list[Event]] = {}
    together: list[int] = []
    while not worker.idle:
        for event in (events := worker.step()):
            out.setdefault(event.request_id, []).append(event)
        together.append(sum(isinstance(event, Token) for event in events))
    for key, prompt in prompts.items():
        assert tokens(out[key]) == expected(prompt, 9)
    assert engine.most_under_way == 2
    assert set(together[2:-4]) == {2}  # half of the four streams in each step


def test_a_long_prompt_fills_the_pipeline_with_its_own_chunks() -> None:
    engine = SumEngine(num_sequences=1, depth=3)
    worker = Worker(engine, prefill_chunk_tokens=4)
    worker.submit(order("long", range(20)))
    worker.step()
    assert engine.most_under_way == 3
    assert tokens(run(worker)["long"]) == expected(range(20), 5)


def test_who_is_cancelled_under_way_does_not_speak_again() -> None:
    engine = SumEngine(num_sequences=1, depth=2)
    worker = Worker(engine, prefill_chunk_tokens=2)
    worker.submit(order("x", (1, 2, 3, 4)))
    assert worker.step() == []
    assert engine.under_way
    worker.cancel("x")
    worker.submit(order("x", (7, 8)))  # the same id and the same slot
    assert not worker.idle
    assert tokens(run(worker)["x"]) == expected((7, 8), 5)


def test_a_resumed_request_goes_on_where_it_was() -> None:
    worker = Worker(SumEngine())
    whole = expected((3, 4), 6)
    worker.submit(order("again", (3, 4), generated_ids=tuple(whole[:4]), max_tokens=6))
    events = run(worker)["again"]
    assert isinstance(events[0], Token)
    assert events[0].index == 4
    assert tokens(events) == whole[4:]


def test_sampled_tokens_do_not_depend_on_company_or_a_crash() -> None:
    params = SamplingParams(seed=11, temperature=3.0)
    alone = Worker(SumEngine(num_sequences=1))
    alone.submit(order("x", (1, 2), params=params, max_tokens=12))
    answer = tokens(run(alone)["x"])
    together = Worker(SumEngine(num_sequences=3), prefill_chunk_tokens=2)
    for key in ("a", "b"):
        together.submit(order(key, range(9), params=SamplingParams(seed=1)))
    resumed = {"params": params, "max_tokens": 12, "generated_ids": tuple(answer[:5])}
    together.submit(order("x", (1, 2), **resumed))
    assert tokens(run(together)["x"]) == answer[5:]


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it() -> None:
    worker = Worker(SumEngine())
    answer = expected((1, 2), 5)
    stop = next(i for i in range(1, 5) if answer[i] not in answer[:i])
    worker.submit(order("x", (1, 2), stop_ids=frozenset({answer[stop]})))
    events = run(worker)["x"]
    assert tokens(events) == answer[:stop]
    assert events[-1] == Done("x", "stop")


def test_the_context_ends_an_answer_with_length() -> None:
    worker = Worker(SumEngine(context_tokens=8))
    worker.submit(order("x", (1, 2, 3), max_tokens=100))
    events = run(worker)["x"]
    assert len(tokens(events)) == 5
    assert events[-1] == Done("x", "length")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ((), "no token"),
        (tuple(range(33)), "33 tokens, the context holds 32"),
        ((50,), "token ids must be 0..49"),
        ((-1,), "token ids must be 0..49"),
    ],
)
def test_an_impossible_request_ends_alone(prompt: tuple[int, ...], text: str) -> None:
    worker = Worker(SumEngine())
    worker.submit(order("bad", prompt))
    assert not worker.idle
    worker.submit(order("good", (1,)))
    out = run(worker)
    (done,) = out["bad"]
    assert isinstance(done, Done)
    assert done.reason == "error"
    assert text in done.text
    assert tokens(out["good"]) == expected((1,), 5)


def test_unusable_logits_end_one_request() -> None:
    worker = Worker(SumEngine())
    worker.submit(order("bad", (POISON,)))
    worker.submit(order("biased", (1,), params=SamplingParams(logit_bias={VOCAB: 1.0})))
    worker.submit(order("good", (1,)))
    out = run(worker)
    (done,) = out["bad"]
    assert isinstance(done, Done)
    assert "NaN" in done.text
    (done,) = out["biased"]
    assert isinstance(done, Done)
    assert "outside the vocabulary" in done.text
    assert tokens(out["good"]) == expected((1,), 5)


def test_nothing_left_to_generate_is_a_length_at_once() -> None:
    worker = Worker(SumEngine(context_tokens=4))
    worker.submit(order("full", (1, 2), generated_ids=(3, 6), max_tokens=9))
    worker.submit(order("done", (1, 2), generated_ids=(3,), max_tokens=1))
    assert run(worker) == {"full": [Done("full", "length")], "done": [Done("done", "length")]}


def test_log_probabilities_come_with_tokens_when_asked() -> None:
    worker = Worker(SumEngine())
    worker.submit(order("with", (1, 2), logprobs=2, max_tokens=1))
    worker.submit(order("without", (1, 2), max_tokens=1))
    out = run(worker)
    token = out["with"][0]
    assert isinstance(token, Token)
    assert token.logprob is not None
    assert token.top[0] == (token.token_id, token.logprob)
    assert len(token.top) == 2
    token = out["without"][0]
    assert isinstance(token, Token)
    assert token.logprob is None
    assert token.top == ()


def test_an_id_in_use_is_refused_and_is_free_again_after_the_end() -> None:
    worker = Worker(SumEngine())
    worker.submit(order("x", (1,)))
    with pytest.raises(ValueError, match="running already"):
        worker.submit(order("x", (1,)))
    run(worker)
    worker.submit(order("x", (1,)))
    assert tokens(run(worker)["x"]) == expected((1,), 5)


def test_cancel_takes_back_waiting_running_and_refused_requests() -> None:
    worker = Worker(SumEngine(num_sequences=1))
    for key in ("running", "waiting"):
        worker.submit(order(key, (1,)))
    worker.submit(order("refused", ()))
    worker.step()
    worker.submit(order("refused", ()))
    for key in ("running", "waiting", "refused", "unknown"):
        worker.cancel(key)
    assert worker.idle
    assert worker.step() == []
    worker.submit(order("next", (2,)))
    assert tokens(run(worker)["next"]) == expected((2,), 5)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_answers_are_right_whatever_comes_and_goes(data: st.DataObject) -> None:
    worker = Worker(
        SumEngine(num_sequences=data.draw(st.integers(1, 3)), depth=data.draw(st.integers(1, 4))),
        prefill_chunk_tokens=data.draw(st.integers(1, 9)),
    )
    number = st.integers(0, 39)
    prompts = data.draw(st.lists(st.lists(number, min_size=1, max_size=12), min_size=1, max_size=6))
    arrivals = [data.draw(st.integers(0, 6)) for _ in prompts]
    cancels = [data.draw(st.none() | st.integers(0, 12)) for _ in prompts]
    out: dict[Hashable, list[Event]] = {key: [] for key in range(len(prompts))}
    for step in range(200):
        for key, prompt in enumerate(prompts):
            if arrivals[key] == step:
                worker.submit(order(key, prompt, max_tokens=4))
            if cancels[key] == step:
                worker.cancel(key)
        for event in worker.step():
            cancelled = cancels[event.request_id]  # type: ignore[call-overload]
            arrived = arrivals[event.request_id]  # type: ignore[call-overload]
            assert cancelled is None or cancelled > step or cancelled < arrived
            out[event.request_id].append(event)
    assert worker.idle
    for key, prompt in enumerate(prompts):
        found, whole = tokens(out[key]), expected(prompt, 4)
        assert found == whole[: len(found)]
        if cancels[key] is None:
            assert out[key][-1] == Done(key, "length")
            assert found == whole


def one_by_one(worker: Worker, *requests: Submit) -> list[Done]:
    """The ends of requests of which each comes when the one before has ended."""
    ends = []
    for request in requests:
        worker.submit(request)
        events = run(worker)[request.request_id]
        assert tokens(events) == expected(request.prompt_ids, request.max_tokens)
        assert isinstance(events[-1], Done)
        ends.append(events[-1])
    return ends


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed + number * number) % 37 for number in range(length)]


def test_what_came_before_need_not_run_again() -> None:
    engine = SumEngine(context_tokens=512, num_sequences=4)
    worker = Worker(engine)
    system, first = prompt(150), prompt(30, 5)
    chat = [*system, *first, *expected([*system, *first], 5)]
    ends = one_by_one(
        worker,
        order("a", [*system, *first]),
        order("b", [*system, 9, 9]),
        order("c", [*chat, 8, 8, 8, 8, 8]),
        order("d", prompt(150, 1)),
    )
    assert [end.cached_tokens for end in ends] == [0, 128, 128, 0]
    assert engine.positions == sum((180, 152, 190, 150)) + 4 * 4 - 2 * 128
    load = worker.load()
    assert (load.prompt_tokens, load.cached_tokens) == (180 + 152 + 190 + 150, 256)
    assert load.free_tokens == load.memory_tokens == 4 * 512
    assert 0 < load.kept_tokens < load.free_tokens
    assert load.tokens_per_s > 0
    assert load.prompt_tokens_per_s > 0


def test_a_resumed_answer_does_not_count_as_a_prompt_that_was_cached() -> None:
    worker = Worker(SumEngine(context_tokens=256))
    ask = prompt(20)
    worker.submit(order("x", ask, max_tokens=150))
    answer = tokens(run(worker)["x"])
    worker.submit(order("y", ask, generated_ids=tuple(answer[:120]), max_tokens=150))
    events = run(worker)["y"]
    assert tokens(events) == answer[120:]
    assert events[-1] == Done("y", "length", cached_tokens=20)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_answers_are_right_with_little_memory(data: st.DataObject) -> None:
    """Prompts that begin alike, pages that are shared, taken away and run again."""
    engine = SumEngine(
        context_tokens=192,
        num_sequences=data.draw(st.integers(1, 4)),
        num_pages=data.draw(st.integers(3, 7)),
        depth=data.draw(st.integers(1, 3)),
    )
    worker = Worker(engine, prefill_chunk_tokens=data.draw(st.integers(1, 90)))
    prompts, answers = [], []
    for _ in range(data.draw(st.integers(1, 6))):
        shared = prompt(data.draw(st.sampled_from([0, 30, 64, 130])))
        own = data.draw(st.lists(st.integers(0, 36), min_size=1, max_size=20))
        prompts.append([*shared, *own])
        answers.append(data.draw(st.integers(1, 40)))
    late = data.draw(st.integers(0, 5))
    for key in range(len(prompts)):
        if key < late:
            worker.submit(order(key, prompts[key], max_tokens=answers[key]))
    for _ in range(data.draw(st.integers(0, 30)) if late else 0):
        early = [e for e in worker.step() if isinstance(e, Done)]
        assert all(e.reason == "length" for e in early)
    for key in range(late):
        worker.cancel(key)
    for key in range(len(prompts)):
        worker.submit(order(key, prompts[key], max_tokens=answers[key]))
    out = run(worker)
    for key in range(len(prompts)):
        assert tokens(out[key]) == expected(prompts[key], answers[key])
    assert worker.load().free_tokens == worker.load().memory_tokens


def test_a_full_queue_refuses_and_says_for_how_long() -> None:
    seconds = iter(range(1000))
    engine = SumEngine(num_sequences=1)
    worker = Worker(engine, queue_limit=2, clock=lambda: float(next(seconds)))
    for key in range(3):
        worker.submit(order(key, (1, 2)))
    worker.submit(order("full", (1, 2)))
    assert worker.step()[0] == Done(
        "full", "busy", "2 requests wait already; try again in 0 s", wait_s=0.0
    )
    for _ in range(6):
        worker.step()  # each takes a second; the first request has ended
    worker.submit(order("taken", (1, 2)))
    load = worker.load()
    assert (load.running, load.waiting, load.most_running, load.queue_limit) == (1, 2, 1, 2)
    assert load.wait_s == pytest.approx(3 * 7.0)  # of seven steps one has come to an end
    worker.submit(order("again", (1, 2), generated_ids=(3,)))  # what has begun goes on
    worker.submit(order("full", (1, 2)))
    refused = [e for e in worker.step() if isinstance(e, Done)]
    assert [(e.request_id, e.reason, e.wait_s) for e in refused] == [("full", "busy", 28.0)]
    assert {key for key, events in run(worker).items() if events[-1].reason == "length"} >= {  # type: ignore[union-attr]
        "taken",
        "again",
    }
    assert worker.load().wait_s == 0.0


def test_keys_take_turns() -> None:
    worker = Worker(SumEngine(num_sequences=1))
    for key in range(3):
        worker.submit(order(key, (1, 2), max_tokens=1, fair_key="greedy"))
    worker.submit(order("modest", (1, 2), max_tokens=1, fair_key="modest"))
    assert list(run(worker)) == [0, "modest", 1, 2]
