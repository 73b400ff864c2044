"""Continuous batching as a pure rule: who gets a slot, and what runs in the next step.

Sequences wait in order of arrival, get a slot, are prefilled in chunks, then decode one token a
step until they are retired. Nothing here knows tokens, only how many there are.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Sequence:
    """One request's place in the batch.

    Attributes:
        length: token ids known (prompt and generated).
        cached: leading positions that have run; ``cached < length`` until it is planned again.
        slot: -1 while it waits.
    """

    key: Hashable
    length: int
    cached: int = 0
    slot: int = -1


@dataclass(frozen=True, slots=True)
class State:
    """Everybody in order of arrival, and the slots nobody has."""

    free_slots: tuple[int, ...]
    waiting: tuple[Sequence, ...] = ()
    running: tuple[Sequence, ...] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """Positions ``start`` to ``stop`` (not included) of one sequence, to run in this step.

    ``complete`` says that every known token will have run, so the next one can be sampled.
    """

    key: Hashable
    slot: int
    start: int
    stop: int
    complete: bool


def empty(num_slots: int) -> State:
    """A batch with nobody in it."""
    return State(free_slots=tuple(range(num_slots)))


def submit(state: State, key: Hashable, length: int) -> State:
    """Put a sequence of ``length`` known tokens at the end of the queue.

    Raises:
        ValueError: the key is here already, or there is no token to run.
    """
    if length < 1:
        raise ValueError(f"{key!r} has no token to run")
    if any(s.key == key for s in (*state.waiting, *state.running)):
        raise ValueError(f"{key!r} is in the batch already")
    return replace(state, waiting=(*state.waiting, Sequence(key, length)))


def plan(state: State, *, step_tokens: int, depth: int = 1) -> tuple[tuple[Work, ...], State]:
    """Admit whom slots allow, and choose the next step's work.

    Every decoding sequence runs its one token. What is left of ``step_tokens``, but at least one
    token, goes to prefills in order of arrival: so a long prompt never stalls running streams for
    longer than a step, and a full batch never starves a prompt.

    A sequence whose newest token is not known yet, since its step is still under way, has no
    work. Where ``depth`` steps may be under way, each takes its fair part of the decoding
    sequences alone, so that there is work for all of them.

    Returns:
        ``(work, next_state)``; the next state counts the work as done.
    """
    num_admitted = min(len(state.free_slots), len(state.waiting))
    admitted = tuple(
        replace(s, slot=slot)
        for s, slot in zip(
            state.waiting[:num_admitted], state.free_slots[:num_admitted], strict=True
        )
    )
    everybody = (*state.running, *admitted)
    most_decodes = -(-sum(_has_begun(s) for s in everybody) // depth)
    num_decodes = min(most_decodes, sum(_decodes(s) for s in everybody))
    budget = max(1, step_tokens - num_decodes)
    work: list[Work] = []
    running: list[Sequence] = []
    for s in everybody:
        count = s.length - s.cached
        if _decodes(s):
            count = min(count, num_decodes)
            num_decodes -= count
        else:
            count = min(count, budget)
            budget -= count
        stop = s.cached + count
        if count:
            work.append(Work(s.key, s.slot, s.cached, stop, stop == s.length))
        running.append(replace(s, cached=stop))
    next_state = State(
        free_slots=state.free_slots[num_admitted:],
        waiting=state.waiting[num_admitted:],
        running=tuple(running),
    )
    return tuple(work), next_state


def extend(state: State, key: Hashable) -> State:
    """Count one more known token of a running sequence: the one just sampled.

    Raises:
        KeyError: the sequence does not run.
    """
    if not any(s.key == key for s in state.running):
        raise KeyError(key)
    running = tuple(replace(s, length=s.length + 1) if s.key == key else s for s in state.running)
    return replace(state, running=running)


def retire(state: State, key: Hashable) -> State:
    """Take a sequence out, at any time; its slot is free for the next. Unknown keys are no-ops."""
    freed = tuple(s.slot for s in state.running if s.key == key)
    return State(
        free_slots=(*state.free_slots, *freed),
        waiting=tuple(s for s in state.waiting if s.key != key),
        running=tuple(s for s in state.running if s.key != key),
    )


def is_idle(state: State) -> bool:
    """Whether nobody waits or runs."""
    return not state.waiting and not state.running


def _decodes(s: Sequence) -> bool:
    return s.cached > 0 and s.length - s.cached == 1


def _has_begun(s: Sequence) -> bool:
    """Whether it decodes, or waits for its newest token."""
    return s.cached > 0 and s.length - s.cached <= 1
