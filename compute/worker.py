"""One rank's requests: batches them, runs the engine, samples, and says what came out.

No I/O, no clock, no thread: the port calls :meth:`Worker.step` while it is not idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from compute import batch
from compute.engine import Engine, Row
from compute.errors import BadLogits, GrammarFailed
from compute.grammar import Matcher
from compute.sampler import SamplingParams, sample
from models.constraint import Constraint

Reason = Literal["stop", "length", "error"]


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
    """The end of an answer; the last event of its request. ``text`` explains an error."""

    request_id: Hashable
    reason: Reason
    text: str = ""


Event = Token | Done


@dataclass(slots=True)
class _Request:
    submit: Submit
    generated_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.submit.prompt_ids) + len(self.generated_ids)

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        num_prompt = len(self.submit.prompt_ids)
        prompt = self.submit.prompt_ids[start:stop]
        return (
            *prompt,
            *self.generated_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)],
        )


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
        on_admitted: Callable[[Sequence[Hashable]], None] = lambda ids: None,
    ) -> None:
        """Take an engine with all its slots free.

        Args:
            prefill_chunk_tokens: most tokens in one step, while some are being prefilled.
            on_admitted: told the requests that take part in a step for the first time, before
                that step runs.
        """
        if prefill_chunk_tokens < 1:
            raise ValueError(f"prefill_chunk_tokens={prefill_chunk_tokens} must be at least 1")
        self._engine = engine
        self._step_tokens = prefill_chunk_tokens
        self._on_admitted = on_admitted
        self._requests: dict[Hashable, _Request] = {}
        self._batch = batch.empty(engine.num_slots)
        self._events: list[Event] = []  # answers that need no step
        self._under_way: deque[list[_Request]] = deque()  # whose logits each step will give

    @property
    def idle(self) -> bool:
        """Whether :meth:`step` has nothing to do or say."""
        return not self._events and not self._under_way and batch.is_idle(self._batch)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._batch.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue for a slot."""
        return len(self._batch.waiting)

    def submit(self, request: Submit) -> None:
        """Take a request. Every later event of it comes from :meth:`step`.

        Raises:
            ValueError: a request of that id is not done yet.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id!r} is running already")
        mine = _Request(request, list(request.generated_ids))
        early = self._refusal(mine) or self._ended(mine)
        if early is not None:
            self._events.append(early)
            return
        self._requests[request.request_id] = mine
        self._batch = batch.submit(self._batch, request.request_id, mine.length)

    def cancel(self, request_id: Hashable) -> None:
        """Forget a request at once, without an event. Unknown ids are no error."""
        self._requests.pop(request_id, None)
        self._batch = batch.retire(self._batch, request_id)
        self._events = [e for e in self._events if e.request_id != request_id]

    def step(self) -> list[Event]:
        """Finish one batch, with as many begun as the engine takes; what came out, in order of
        arrival of the requests."""
        events, self._events = self._events, []
        while len(self._under_way) < self._engine.depth and self._begin():
            pass
        if not self._under_way:
            return events
        complete = self._under_way.popleft()
        logits = self._engine.finish()
        for mine, row in zip(complete, logits, strict=True):
            key = mine.submit.request_id
            if self._requests.get(key) is mine:  # not cancelled meanwhile
                events.extend(self._sampled(key, row))
        return events

    def _begin(self) -> bool:
        """Start the next batch; False where nobody has work."""
        work, self._batch = batch.plan(
            self._batch, step_tokens=self._step_tokens, depth=self._engine.depth
        )
        if not work:
            return False
        new = [w.key for w in work if w.start == 0]
        if new:
            self._on_admitted(new)
        self._engine.start(
            [
                Row(w.slot, self._requests[w.key].ids(w.start, w.stop), w.start, w.complete)
                for w in work
            ]
        )
        self._under_way.append([self._requests[w.key] for w in work if w.complete])
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
                return [self._retired(Done(key, "stop"))]
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
        self._batch = batch.extend(self._batch, key)
        return [token]

    def _retired(self, done: Done) -> Done:
        del self._requests[done.request_id]
        self._batch = batch.retire(self._batch, done.request_id)
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
        return None

    def _ended(self, mine: _Request) -> Done | None:
        """Length is reached when the answer is full or its next token would find no room."""
        if mine.submit.matcher is not None and mine.submit.matcher.complete:
            return Done(mine.submit.request_id, "stop")
        full = len(mine.generated_ids) >= mine.submit.max_tokens
        if full or mine.length >= self._engine.context_tokens:
            return Done(mine.submit.request_id, "length")
        return None
