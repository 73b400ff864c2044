"""Constraints at the head rank: compiled for the model's vocabulary, and one matcher a request.

A matcher says which tokens may come next; the sampler draws from these alone. It knows nothing
but the tokens it was given, so after a crash the answer so far puts a fresh one where the lost one
was. Compiling and replay happen on a thread of their own (``compute/port_server.py``), masks on
the engine's.

A mask is made of Rust code that holds no interpreter lock; it costs 0.02 to 0.2 ms for JSON over
49,152 tokens. Grammars that cost far more exist; what one may spend is bounded, see ``MASK_S``.

Source: llguidance, the library (Microsoft, MIT): Earley parser over derivatives of regular
expressions, masks by walking a trie of the vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from compute.errors import GrammarFailed
from models.constraint import Constraint, parser_limits, source
from models.errors import BadConstraint
from models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = npt.NDArray[np.bool_]

MAX_COMPILED: Final = 32  # grammars kept; their tables grow to some MB at most
MASK_S: Final = 0.01  # of processor time that a grammar may take for each token in the long run
MASK_BURST_S: Final = 0.25  # and beyond that, once


class Matcher:
    """Where one answer is in its grammar. Not thread-safe; one for each request."""

    def __init__(self, inner: LLMatcher, vocab_size: int) -> None:
        self._inner, self._vocab_size = inner, vocab_size
        self._overspent_s = 0.0

    @property
    def complete(self) -> bool:
        """Whether the grammar is satisfied and no token can follow."""
        return self._inner.is_stopped() and not self._inner.is_error()

    def allowed(self, stop_ids: Iterable[int] = ()) -> Mask:
        """Which tokens may come next: bool ``(vocab_size,)``.

        Args:
            stop_ids: tokens that end the answer; allowed where the grammar may end, and only
                there.

        Raises:
            GrammarFailed: no token fits, or the grammar is too complex to go on with.
        """
        began_s = time.thread_time()
        try:
            packed = self._inner.compute_bitmask()
        except ValueError as exc:
            raise GrammarFailed(str(exc)) from exc
        self._check()
        bits = np.frombuffer(packed, dtype=np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        ends = self._inner.is_accepting()
        for token_id in stop_ids:
            mask[token_id] = ends
        if not mask.any():
            raise GrammarFailed("no token of this model goes on from here")
        self._spend(time.thread_time() - began_s)
        return mask

    def accept(self, token_id: int) -> None:
        """Go on by a token of the answer. Raises GrammarFailed for one that does not fit."""
        self._inner.consume_token(token_id)
        self._check()

    def replay(self, token_ids: Sequence[int]) -> None:
        """Go on by all of these, as after a crash. Raises GrammarFailed."""
        if token_ids:
            self._inner.consume_tokens(list(token_ids))
        self._check()

    def _spend(self, took_s: float) -> None:
        self._overspent_s = max(0.0, self._overspent_s + took_s - MASK_S)
        if self._overspent_s > MASK_BURST_S:
            raise GrammarFailed(
                f"it takes more than {MASK_S * 1e3:.0f} ms for each token; make it less ambiguous"
            )

    def _check(self) -> None:
        if self._inner.is_error():
            raise GrammarFailed(self._inner.get_error().partition("\n<non-verbose/>")[0][:400])


class Grammars:
    """Compiles constraints for one vocabulary, and keeps the latest. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Index the vocabulary: 0.3 s for 49,152 tokens, 2 s for 262,144.

        Args:
            vocab_size: of the model's logits; ids that the tokenizer lacks are never allowed.
        """
        from llguidance import LLTokenizer

        self._vocab_size = vocab_size
        wrapper: Any = _Vocabulary(tokenizer, vocab_size)
        self._tokenizer: LLTokenizer = LLTokenizer(
            wrapper,
            n_vocab=vocab_size + 1,
            eos_token=vocab_size,
            slices=LLTokenizer.json_slices(),
        )
        wrapper.greedy = self._tokenizer.greedy_tokenize
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint, generated_ids: Sequence[int] = ()) -> Matcher:
        """A matcher that stands behind ``generated_ids``. Milliseconds, seconds for bad cases.

        Raises:
            BadConstraint: the constraint cannot be enforced.
            GrammarFailed: the tokens so far do not fit it.
        """
        with self._lock:
            compiled = self._compiled.get(constraint)
            if compiled is None:
                compiled = self._compile(constraint)
                self._compiled[constraint] = compiled
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end(constraint)
        matcher = Matcher(compiled.deep_copy(), self._vocab_size)
        matcher.replay(generated_ids)
        return matcher

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher

        compiled = LLMatcher(
            self._tokenizer, source(constraint), log_level=0, limits=parser_limits()
        )
        if compiled.is_error():
            raise BadConstraint(constraint.kind, compiled.get_error()[:400])
        probe = Matcher(compiled.deep_copy(), self._vocab_size)
        if not probe.complete:
            try:
                probe.allowed((self._vocab_size - 1,) if compiled.is_accepting() else ())
            except GrammarFailed as exc:
                raise BadConstraint(constraint.kind, str(exc)) from exc
        return compiled


class _Vocabulary:
    """The tokenizer as llguidance wants it.

    An id behind the last one stands for the end of a text, so that no real token is taken for it:
    which tokens end an answer is the request's to say.
    """

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(known)]
        self.tokens += [b""] * (vocab_size - known) + [b"<end>"]
        self.eos_token_id = vocab_size
        special = (token_id for token_id in tokenizer.special_ids if token_id < vocab_size)
        self.special_token_ids = [*sorted(special), vocab_size]
        self.greedy: Any = None

    def __call__(self, text: str | bytes) -> list[int]:
        """How the model itself would write a text that the grammar forces."""
        shown = text if isinstance(text, str) else text.decode("utf-8", "replace")
        ids = self._tokenizer.encode(shown, parse_special=False)
        if b"".join(map(self._tokenizer.token_bytes, ids)) == shown.encode():
            return ids
        found: list[int] = self.greedy(shown)  # a tokenizer that puts a space before a text
        return found
