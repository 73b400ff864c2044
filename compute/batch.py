"""Continuous batching: who gets a slot and memory, and which positions run in the next step.

Sequences wait in a fair queue, are admitted where a slot and memory for all of their known tokens
are free, are prefilled in chunks, then decode one token a step until they are retired. Where
memory is short the youngest gives its pages back and begins anew later; what others still
remember of its text it need not run again. No I/O, no clock, no randomness: the same calls always
give the same plans.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from compute.fair_queue import FairQueue
from compute.pages import ROOT, Key, Pages
from models.footprint import PAGE_TOKENS


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's place in the batch.

    Attributes:
        number: in order of arrival.
        ids: all known tokens, of prompt and answer; ``most_tokens``: how many they can become.
        cached: leading positions whose keys and values are in memory once the steps under way
            have run; ``cached < len(ids)`` until all are planned.
        reused: positions that others had run, when first admitted and while it was prefilled.
        slot: -1 while it waits.
        pages: held, in order; ``num_told``: how many of them the stages know in their place.
        texts: of the leading pages that are remembered.
        samples: a step is under way whose logits give its next token.
    """

    key: Hashable
    fair_key: str
    number: int
    ids: list[int]
    most_tokens: int
    cached: int = 0
    reused: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_told: int = 0
    texts: list[int] = field(default_factory=list)
    samples: bool = False
    begun: bool = False

    @property
    def left(self) -> int:
        """Known tokens that are not planned yet."""
        return len(self.ids) - self.cached

    @property
    def decodes(self) -> bool:
        """Whether its one newest token is to run."""
        return self.cached > 0 and self.left == 1


@dataclass(slots=True)
class Work:
    """Positions ``start`` to ``stop`` (not included) of one sequence, to run in this step.

    Attributes:
        decodes: it is one token of a running stream.
        first: the sequence has not been in a step before.
        ids: the tokens to run.
        complete: every known token will have run, so the next one can be sampled.
        pages: that the stages do not know yet, from ``first_page`` of the sequence on.
    """

    sequence: Sequence
    start: int
    stop: int
    decodes: bool
    first: bool
    ids: tuple[int, ...] = ()
    complete: bool = False
    first_page: int = 0
    pages: tuple[int, ...] = ()


class Batch:
    """Everybody who waits or runs."""

    def __init__(self, *, num_slots: int, pages: Pages, pages_a_slot: int) -> None:
        """Take a memory that holds at least one sequence of full length.

        Args:
            num_slots: sequences that run at once.
            pages_a_slot: of the longest sequence.
        """
        if pages.num_pages < pages_a_slot:
            raise ValueError(f"{pages.num_pages} pages cannot hold {pages_a_slot} of one sequence")
        self.pages = pages
        self.running: list[Sequence] = []  # in order of arrival
        self.short_of_memory = False  # so that somebody waits although there is a slot
        self.num_preempted = 0
        self.reused_tokens = 0  # of all sequences ever
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._waiting: FairQueue[Sequence] = FairQueue()
        self._preempted: list[Sequence] = []  # in order of arrival; before all who wait
        self._members: dict[Hashable, Sequence] = {}
        self._count = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting) + len(self._preempted)

    @property
    def num_waiting_long(self) -> int:
        """Those of them for whom the next step has no room, as far as is known."""
        return max(0, self.num_waiting - (0 if self.short_of_memory else len(self._free_slots)))

    @property
    def idle(self) -> bool:
        """Whether nobody waits or runs."""
        return not self._members

    def submit(
        self, key: Hashable, ids: list[int], *, most_tokens: int, fair_key: str = ""
    ) -> Sequence:
        """Put a sequence of known tokens at the end of its key's queue.

        Args:
            most_tokens: that it can have at its end; at most those of all pages of a slot.

        Raises:
            ValueError: the key is here already, or there is no token to run.
        """
        if not ids:
            raise ValueError(f"{key!r} has no token to run")
        if key in self._members:
            raise ValueError(f"{key!r} is in the batch already")
        sequence = Sequence(key, fair_key, self._count, ids, most_tokens)
        self._count += 1
        self._members[key] = sequence
        self._waiting.push(fair_key, sequence)
        return sequence

    def extend(self, key: Hashable, token_id: int) -> None:
        """Add the token just sampled to a sequence. Raises KeyError where it is not here."""
        sequence = self._members[key]
        sequence.ids.append(token_id)
        sequence.samples = False

    def retire(self, key: Hashable) -> None:
        """Take a sequence out, at any time. Unknown keys are no-ops."""
        sequence = self._members.pop(key, None)
        if sequence is None:
            return
        if sequence.slot >= 0:
            self._leave(sequence)
        elif sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            self._waiting.remove(sequence.fair_key, lambda other: other is sequence)

    def plan(self, *, step_tokens: int, beside_tokens: int, depth: int = 1) -> list[Work]:
        """Admit whom slots and memory allow, and choose the next step's work.

        Every decoding sequence runs its one token. What is left of ``step_tokens`` goes to
        prefills: half of it to who came first, so that nobody waits for ever, and the rest to
        those with the fewest tokens left, so that nobody waits behind a long prompt.

        A sequence whose newest token is not known yet, since its step is still under way, has no
        work. Where ``depth`` steps may be under way, each takes its fair part of the decoding
        sequences alone, so that there is work for all of them.

        Args:
            step_tokens: most positions of the step; one more than the decoding ones at least.
            beside_tokens: most positions of prefills where others decode.

        Returns:
            In the order in which their rows must run: a row may read what one before it, of the
            same step, writes. They count as done.
        """
        self._admit()
        begun = sum(s.samples or s.decodes for s in self.running)
        decodes = self._decodes(-(-begun // depth))
        budget = step_tokens - len(decodes)
        if begun:
            budget = min(budget, beside_tokens)
        work = decodes + self._prefills(max(1, budget))
        for w in work:
            self._describe(w)
        return work

    # -- memory ----------------------------------------------------------------------------

    def _decodes(self, most: int) -> list[Work]:
        work: list[Work] = []
        for s in list(self.running):
            if len(work) == most:
                break
            if s.slot >= 0 and s.decodes and self._has_room(s):
                work.append(self._run(s, 1))
        return work

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether its next position has a page; the youngest may have lost theirs for it."""
        if sequence.cached < len(sequence.pages) * PAGE_TOKENS:
            return True
        while not self.pages.num_available:
            youngest = next(s for s in reversed(self.running) if s is sequence or not s.samples)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        behind = sequence.pages[-1] if sequence.pages else -1
        sequence.pages += self.pages.take(1, behind=behind)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.cached = 0
        self._preempted.append(sequence)
        self._preempted.sort(key=lambda s: s.number)
        self.num_preempted += 1

    def _leave(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.texts, sequence.num_told = [], [], 0
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _admit(self) -> None:
        self.short_of_memory = False
        while self._free_slots:
            candidate = self._preempted[0] if self._preempted else self._waiting.peek()
            if candidate is None:
                return
            if candidate.samples or not self._settle(candidate):
                self.short_of_memory = True
                return
            if self._preempted:
                self._preempted.pop(0)
            else:
                self._waiting.pop()
            candidate.slot = self._free_slots.pop()
            at = sum(s.number < candidate.number for s in self.running)
            self.running.insert(at, candidate)

    def _settle(self, sequence: Sequence) -> bool:
        """Give a sequence pages for all known tokens; False where memory is short.

        A page is left for each running one that can grow, so that none preempts it at once.
        """
        while self._reuse(sequence):
            pass
        missing = -(-len(sequence.ids) // PAGE_TOKENS) - len(sequence.pages)
        growing = sum(len(s.pages) * PAGE_TOKENS < s.most_tokens for s in self.running)
        if missing + growing > self.pages.num_available:
            self.pages.release(sequence.pages)
            sequence.pages, sequence.texts, sequence.cached = [], [], 0
            return False
        behind = sequence.pages[-1] if sequence.pages else -1
        sequence.pages += self.pages.take(missing, behind=behind)
        self._count_reused(sequence, sequence.cached)
        return True

    def _count_reused(self, sequence: Sequence, tokens: int) -> None:
        """Answer tokens that run again after a preemption are nothing that a client saved."""
        if not sequence.begun:
            sequence.reused += tokens
            self.reused_tokens += tokens

    # -- texts -----------------------------------------------------------------------------

    def _next_key(self, sequence: Sequence) -> Key | None:
        """Under what its next page is remembered; None in the middle of one, or where a token
        has to run so that there are logits."""
        start = sequence.cached
        if start % PAGE_TOKENS or len(sequence.ids) - start <= PAGE_TOKENS:
            return None
        before = sequence.texts[-1] if sequence.texts else ROOT
        return before, tuple(sequence.ids[start : start + PAGE_TOKENS])

    def _reuse(self, sequence: Sequence) -> bool:
        """Hold the next page instead of running it, where it is remembered."""
        key = self._next_key(sequence)
        known = None if key is None else self.pages.find(*key)
        if known is None:
            return False
        self._put(sequence, len(sequence.texts), known.page)
        sequence.texts.append(known.text)
        sequence.cached += PAGE_TOKENS
        return True

    def _put(self, sequence: Sequence, index: int, page: int) -> None:
        """Let a remembered page be one of a sequence's."""
        self.pages.hold(page)
        if index == len(sequence.pages):
            sequence.pages.append(page)
            return
        self.pages.release([sequence.pages[index]])
        sequence.pages[index] = page
        sequence.num_told = min(sequence.num_told, index)

    def _remember(self, sequence: Sequence) -> None:
        """Whatever pages are full now can be found by others, also in this step."""
        for index in range(len(sequence.texts), sequence.cached // PAGE_TOKENS):
            before = sequence.texts[-1] if sequence.texts else ROOT
            ids = tuple(sequence.ids[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS])
            known = self.pages.remember(sequence.pages[index], before, ids)
            if known.page != sequence.pages[index]:
                self._put(sequence, index, known.page)
            sequence.texts.append(known.text)

    # -- the step --------------------------------------------------------------------------

    def _prefills(self, budget: int) -> list[Work]:
        waiting = [s for s in self.running if not s.samples and s.left and not s.decodes]
        if not waiting:
            return []
        oldest, *others = waiting
        others.sort(key=lambda s: s.left)  # equal ones stay in order of arrival
        work: list[Work] = []
        filling: set[Key] = set()  # pages that a row of this step begins or goes on with
        share = budget if not others else -(-budget // 2)
        for s in (oldest, *others):
            if not budget:
                break
            reused = s.cached
            while self._reuse(s):
                pass
            self._count_reused(s, s.cached - reused)
            key = self._next_key(s)
            if key is not None and key in filling:
                continue  # the next step finds it remembered, or goes on with it
            count = min(s.left, share if s is oldest else budget)
            budget -= count
            work.append(self._run(s, count))
            page = s.cached // PAGE_TOKENS
            if s.cached % PAGE_TOKENS and len(s.ids) >= (page + 1) * PAGE_TOKENS:
                before = s.texts[-1] if s.texts else ROOT
                ids = tuple(s.ids[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS])
                filling.add((before, ids))
        if budget and work[0].sequence is oldest and oldest.left:
            more = self._run(oldest, min(oldest.left, budget))
            work[0].stop = more.stop
        return work

    def _run(self, sequence: Sequence, count: int) -> Work:
        start, decodes = sequence.cached, sequence.decodes
        sequence.cached += count
        self._remember(sequence)
        work = Work(sequence, start, sequence.cached, decodes, not sequence.begun)
        sequence.begun = True
        sequence.samples = sequence.left == 0
        return work

    def _describe(self, work: Work) -> None:
        """Tell the stages what to run, and what is new of a sequence's pages."""
        s = work.sequence
        work.ids, work.complete = tuple(s.ids[work.start : work.stop]), s.samples
        work.first_page, work.pages = s.num_told, tuple(s.pages[s.num_told :])
        s.num_told = len(s.pages)
