"""One rank's requests: batches them, runs the engine, samples, and says what came out.

No I/O, no thread: the port calls :meth:`Worker.step` while it is not idle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from compute.batch import Batch, Work
from compute.batch import Sequence as InBatch
from compute.engine import Engine, Row
from compute.errors import BadLogits, GrammarFailed
from compute.grammar import Matcher
from compute.pace import Pace
from compute.pages import Pages
from compute.sampler import SamplingParams, sample
from models.constraint import Constraint
from models.footprint import PAGE_TOKENS

Reason = Literal["stop", "length", "error", "busy", "cancelled"]
STEP_TARGET_S: Final = 0.1  # at most, while streams run: what still reads as a steady stream
QUEUE_LIMIT: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A request, or the rest of one after a crash.

    Attributes:
        request_id: unique among the requests that are not done.
        prompt_ids: at least one token.
        generated_ids: answer tokens that exist already; they run with the prompt and the next
            token has index ``len(generated_ids)``.
        max_tokens: length of the whole answer, ``generated_ids`` included.
        stop_ids: tokens that end the answer and are not part of it.
        logprobs: None, or how many of the likeliest tokens to report beside the drawn one.
        constraint: the form of the answer; None for any.
        matcher: the constraint compiled, behind ``generated_ids``; this request alone uses it.
        fair_key: requests of different keys take turns in the queue.
    """

    request_id: Hashable
    prompt_ids: tuple[int, ...]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    generated_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    matcher: Matcher | None = None
    fair_key: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """Token ``index`` of an answer. ``logprob`` is None unless asked for."""

    request_id: Hashable
    index: int
    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer; the last event of its request.

    Attributes:
        reason: ``busy`` where the queue is full: nothing has run. A worker says nothing of
            requests that are cancelled.
        text: explains an error.
        cached_tokens: of the prompt, that did not have to run again.
        wait_s: where busy, how long until there should be room.
    """

    request_id: Hashable
    reason: Reason
    text: str = ""
    cached_tokens: int = 0
    wait_s: float = 0.0


Event = Token | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much there is to do, and how fast it goes.

    Attributes:
        running, most_running: requests that take part in steps, and how many can.
        waiting, queue_limit: requests that do not yet, and how many may.
        wait_s: how long one that came now would wait; 0 where it would run at once.
        tokens_per_s: of all running streams together; prompt_tokens_per_s: of prompts.
        memory_tokens: positions of key/value memory; free_tokens: of them those that a new
            request can have; kept_tokens: of these those with a text that may come again.
        prompt_tokens: of all requests so far; cached_tokens: of them, those that did not run.
        preempted: how often a request lost its memory and began anew.
    """

    running: int
    most_running: int
    waiting: int
    queue_limit: int
    wait_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    memory_tokens: int
    free_tokens: int
    kept_tokens: int
    prompt_tokens: int
    cached_tokens: int
    preempted: int


@dataclass(slots=True)
class _Request:
    submit: Submit
    generated_ids: list[int]
    place: InBatch | None = None  # None where it never came into the batch

    @property
    def length(self) -> int:
        return len(self.submit.prompt_ids) + len(self.generated_ids)

    @property
    def cached_tokens(self) -> int:
        reused = 0 if self.place is None else self.place.reused
        return min(reused, len(self.submit.prompt_ids))


@dataclass(frozen=True, slots=True)
class _Step:
    """One that is under way: whose logits it gives, and how much runs in it."""

    complete: list[_Request]
    decodes: int
    prefills: int


class Worker:
    """Requests in, tokens out, one batched step at a time.

    A request that cannot be served ends with ``Done("error", text)``; others do not notice. What
    the engine itself raises is not caught: the rank is broken, and its supervisor decides.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        prefill_chunk_tokens: int = 256,
        step_target_s: float = STEP_TARGET_S,
        queue_limit: int = QUEUE_LIMIT,
        on_admitted: Callable[[Sequence[Hashable]], None] = lambda ids: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take an engine that runs nothing.

        Args:
            prefill_chunk_tokens: most tokens in one step, while some are being prefilled.
            step_target_s: most seconds from token to token of a stream, where prompts can be cut
                so small.
            queue_limit: requests that may wait; one more ends as busy.
            on_admitted: told the requests that take part in a step for the first time, before
                that step runs.
            clock: seconds of any origin.
        """
        if prefill_chunk_tokens < 1:
            raise ValueError(f"prefill_chunk_tokens={prefill_chunk_tokens} must be at least 1")
        self._engine = engine
        self._step_tokens, self._queue_limit = prefill_chunk_tokens, queue_limit
        self._on_admitted, self._clock = on_admitted, clock
        self._requests: dict[Hashable, _Request] = {}
        self._batch = Batch(
            num_slots=engine.num_sequences,
            pages=Pages(engine.num_pages),
            pages_a_slot=-(-engine.context_tokens // PAGE_TOKENS),
        )
        self._pace = Pace(target_s=step_target_s / engine.depth, most_tokens=prefill_chunk_tokens)
        self._events: list[Event] = []  # answers that need no step
        self._under_way: deque[_Step] = deque()
        self._prompt_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether :meth:`step` has nothing to do or say."""
        return not self._events and not self._under_way and self._batch.idle

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._batch.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue for a slot."""
        return self._batch.num_waiting

    def load(self) -> Load:
        """How much there is to do now."""
        pages, batch, pace = self._batch.pages, self._batch, self._pace
        return Load(
            running=self.num_running,
            most_running=self._engine.num_sequences,
            waiting=self.num_waiting,
            queue_limit=self._queue_limit,
            wait_s=self._wait_s(),
            tokens_per_s=pace.tokens_per_s,
            prompt_tokens_per_s=pace.prompt_tokens_per_s,
            memory_tokens=pages.num_pages * PAGE_TOKENS,
            free_tokens=pages.num_available * PAGE_TOKENS,
            kept_tokens=pages.num_kept * PAGE_TOKENS,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=batch.reused_tokens,
            preempted=batch.num_preempted,
        )

    def submit(self, request: Submit) -> None:
        """Take a request. Every later event of it comes from :meth:`step`.

        Raises:
            ValueError: a request of that id is not done yet.
        """
        key = request.request_id
        if key in self._requests:
            raise ValueError(f"request {key!r} is running already")
        mine = _Request(request, list(request.generated_ids))
        early = self._refusal(mine) or self._ended(mine)
        if early is not None:
            self._events.append(early)
            return
        self._requests[key] = mine
        ids = [*request.prompt_ids, *request.generated_ids]
        mine.place = self._batch.submit(
            key,
            ids,
            most_tokens=min(
                len(request.prompt_ids) + request.max_tokens, self._engine.context_tokens
            ),
            fair_key=request.fair_key,
        )
        self._prompt_tokens += len(request.prompt_ids)

    def cancel(self, request_id: Hashable) -> None:
        """Forget a request at once, without an event. Unknown ids are no error."""
        self._requests.pop(request_id, None)
        self._batch.retire(request_id)
        self._events = [e for e in self._events if e.request_id != request_id]

    def step(self) -> list[Event]:
        """Finish one batch, with as many begun as the engine takes; what came out, in the order
        of its rows."""
        begin_s = self._clock()
        events, self._events = self._events, []
        while len(self._under_way) < self._engine.depth and self._begin():
            pass
        if not self._under_way:
            return events
        step = self._under_way.popleft()
        logits = self._engine.finish()
        for mine, row in zip(step.complete, logits, strict=True):
            key = mine.submit.request_id
            if self._requests.get(key) is mine:  # not cancelled meanwhile
                events.extend(self._sampled(key, row))
        seconds = self._clock() - begin_s
        self._pace.ran(seconds, decodes=step.decodes, prefills=step.prefills)
        return events

    def _begin(self) -> bool:
        """Start the next batch; False where nobody has work."""
        work = self._batch.plan(
            step_tokens=self._step_tokens,
            beside_tokens=self._pace.beside_tokens(),
            depth=self._engine.depth,
        )
        if not work:
            return False
        new = [w.sequence.key for w in work if w.first]
        if new:
            self._on_admitted(new)
        self._engine.start([_row(w) for w in work])
        tokens = sum(len(w.ids) for w in work)
        decodes = sum(w.decodes for w in work)
        complete = [self._requests[w.sequence.key] for w in work if w.complete]
        self._under_way.append(_Step(complete, decodes, tokens - decodes))
        return True

    def _sampled(
        self, key: Hashable, logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    ) -> list[Event]:
        mine = self._requests[key]
        request = mine.submit
        index = len(mine.generated_ids)
        matcher = request.matcher
        try:
            drawn = sample(
                logits,
                request.params,
                request.prompt_ids,
                mine.generated_ids,
                index,
                logprobs=request.logprobs,
                allowed=None if matcher is None else matcher.allowed(request.stop_ids),
            )
            if drawn.token_id in request.stop_ids:
                return [self._retired(Done(key, "stop", cached_tokens=mine.cached_tokens))]
            if matcher is not None:
                matcher.accept(drawn.token_id)
        except (BadLogits, GrammarFailed, ValueError) as exc:
            return [self._retired(Done(key, "error", str(exc)))]
        mine.generated_ids.append(drawn.token_id)
        logprob = None if request.logprobs is None else drawn.logprob
        token = Token(key, index, drawn.token_id, logprob, tuple(drawn.top))
        done = self._ended(mine)
        if done is not None:
            return [token, self._retired(done)]
        self._batch.extend(key, drawn.token_id)
        return [token]

    def _retired(self, done: Done) -> Done:
        del self._requests[done.request_id]
        self._batch.retire(done.request_id)
        self._pace.ended()
        return done

    def _refusal(self, mine: _Request) -> Done | None:
        key, prompt_ids = mine.submit.request_id, mine.submit.prompt_ids
        vocab_size = self._engine.spec.vocab_size
        if not prompt_ids:
            return Done(key, "error", "the prompt has no token")
        if mine.length > self._engine.context_tokens:
            return Done(
                key,
                "error",
                f"the prompt has {mine.length} tokens, the context holds "
                f"{self._engine.context_tokens}: shorten it or load the model with more context",
            )
        ids = (*prompt_ids, *mine.generated_ids)
        if min(ids) < 0 or max(ids) >= vocab_size:
            return Done(key, "error", f"token ids must be 0..{vocab_size - 1}")
        if mine.submit.constraint is not None and mine.submit.matcher is None:
            return Done(key, "error", "the grammar of this request was not compiled")
        ahead = self._batch.num_waiting_long
        if ahead >= self._queue_limit and not mine.generated_ids:  # what has begun goes on
            wait_s = self._wait_s()
            text = f"{ahead} requests wait already; try again in {wait_s:.0f} s"
            return Done(key, "busy", text, wait_s=wait_s)
        return None

    def _wait_s(self) -> float:
        """How long a request that came now would wait for its first step."""
        num_ends = self._batch.num_waiting_long + 1
        if num_ends == 1 and self.num_running + self.num_waiting < self._engine.num_sequences:
            return 0.0
        left = [r.submit.max_tokens - len(r.generated_ids) for r in self._requests.values()]
        places = [r.place for r in self._requests.values() if r.place is not None]
        return self._pace.wait_s(
            num_ends,
            prompt_tokens=sum(max(0, place.left - 1) for place in places),
            answer_tokens=max(left, default=0),
        )

    def _ended(self, mine: _Request) -> Done | None:
        """Length is reached when the answer is full or its next token would find no room."""
        if mine.submit.matcher is not None and mine.submit.matcher.complete:
            return Done(mine.submit.request_id, "stop", cached_tokens=mine.cached_tokens)
        full = len(mine.generated_ids) >= mine.submit.max_tokens
        if full or mine.length >= self._engine.context_tokens:
            return Done(mine.submit.request_id, "length", cached_tokens=mine.cached_tokens)
        return None


def _row(work: Work) -> Row:
    return Row(work.sequence.slot, work.ids, work.start, work.complete, work.pages, work.first_page)
