"""Token events to text: whole code points, stop strings, finish reasons and log-probabilities.

Pure: no I/O and no clock. One ``AnswerText`` serves one choice of one request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from control.backend import FinishReason, TokenEvent

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI shows this for a token that cannot be


class Detokenizer(Protocol):
    """Bytes to text, one token at a time."""

    def push(self, token_id: int, /) -> str:
        """Text that this token completes; never half a code point."""
        ...

    def flush(self) -> str:
        """What is left of an unfinished code point."""
        ...


class TokenTable(Protocol):
    """What a token is made of."""

    def token_bytes(self, token_id: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer, with the tokens it came from.

    Attributes:
        starts: for each token, the character of the answer at which its text begins.
    """

    text: str = ""
    tokens: tuple[TokenEvent, ...] = ()
    starts: tuple[int, ...] = ()

    @staticmethod
    def join(deltas: Sequence[Delta]) -> Delta:
        """Pieces that follow each other, as one."""
        return Delta(
            "".join(delta.text for delta in deltas),
            tuple(event for delta in deltas for event in delta.tokens),
            tuple(start for delta in deltas for start in delta.starts),
        )


class StopScanner:
    """Finds the first of several strings in text that arrives in pieces.

    Knuth-Morris-Pratt per string, so one character costs constant time however
    long the strings are, and the state says how much text may still be part of one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._fallbacks = tuple(_fallback(stop) for stop in stops)
        self._matched = [0] * len(self._stops)

    def feed(self, text: str) -> tuple[int, int] | None:
        """Look at ``text``, which follows everything fed before.

        Returns:
            ``(end, length)`` of the stop string completed first: it ends before character
            ``end`` of ``text`` and has ``length`` characters (the longest, if several end
            there). None when there is none.
        """
        for at, char in enumerate(text):
            found = 0
            for n, stop in enumerate(self._stops):
                matched = self._matched[n]
                while matched and stop[matched] != char:
                    matched = self._fallbacks[n][matched - 1]
                if stop[matched] == char:
                    matched += 1
                if matched == len(stop):
                    found = max(found, matched)
                    matched = self._fallbacks[n][matched - 1]
                self._matched[n] = matched
            if found:
                return at + 1, found
        return None

    @property
    def num_pending(self) -> int:
        """Characters at the end of the text that may be the start of a stop string."""
        return max(self._matched, default=0)


def _fallback(stop: str) -> tuple[int, ...]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    matched = 0
    for n in range(1, len(stop)):
        while matched and stop[matched] != stop[n]:
            matched = table[matched - 1]
        if stop[matched] == stop[n]:
            matched += 1
        table[n] = matched
    return tuple(table)


@dataclass(slots=True)
class AnswerText:
    """Text of one choice. Feed it every TokenEvent, then ``finish`` it once.

    A delta never holds half a code point nor any part of a stop string, and the
    deltas joined are the same text however the answer is delivered.

    Attributes:
        stop_text: the stop string that was completed, if one was.
        num_tokens: tokens seen, those of a stop string included.
    """

    detokenizer: Detokenizer
    stops: tuple[str, ...] = ()
    stop_text: str | None = None
    num_tokens: int = 0
    _scanner: StopScanner = field(init=False)
    _held: str = ""  # decoded, but possibly the start of a stop string
    _sent: int = 0  # characters given out
    _waiting: deque[tuple[int, TokenEvent]] = field(default_factory=deque)  # (first character, ...)

    def __post_init__(self) -> None:
        self._scanner = StopScanner(self.stops)

    @property
    def stopped(self) -> bool:
        """A stop string was completed; the generation can be closed."""
        return self.stop_text is not None

    def push(self, event: TokenEvent) -> Delta:
        """Add one token; events after a stop string add nothing."""
        if self.stopped:
            return Delta()
        self.num_tokens += 1
        self._waiting.append((self._sent + len(self._held), event))
        return self._take(self.detokenizer.push(event.token_id))

    def finish(self, reason: FinishReason) -> tuple[Delta, FinishReason]:
        """Give out what was held back; ``reason`` becomes ``stop`` when a stop string ended it."""
        if self.stopped:
            return Delta(), "stop"
        last = self._take(self.detokenizer.flush())
        if self.stopped:
            return last, "stop"
        text, self._held = self._held, ""
        self._sent += len(text)
        return Delta.join([last, self._release(text, len(self._waiting))]), reason

    def _take(self, text: str) -> Delta:
        found = self._scanner.feed(text)
        if found is None:
            whole = self._held + text
            keep = self._scanner.num_pending
            ready, self._held = whole[: len(whole) - keep], whole[len(whole) - keep :]
        else:
            end, length = found
            whole = self._held + text[:end]
            ready, self.stop_text = whole[: len(whole) - length], whole[len(whole) - length :]
            self._held = ""
        self._sent += len(ready)
        count = sum(1 for start, _ in self._waiting if start < self._sent)
        delta = self._release(ready, count)
        if self.stopped:
            self._waiting.clear()
        return delta

    def _release(self, text: str, count: int) -> Delta:
        shown = [self._waiting.popleft() for _ in range(count)]
        return Delta(text, tuple(event for _, event in shown), tuple(start for start, _ in shown))


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's ``usage``."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def shown_logprob(logprob: float | None) -> float:
    """A log-probability (natural) that JSON can hold."""
    return LOWEST_LOGPROB if logprob is None else max(logprob, LOWEST_LOGPROB)


def chat_logprobs(tokens: Sequence[TokenEvent], table: TokenTable) -> dict[str, Any]:
    """``logprobs`` of a chat choice or chunk, with the bytes of each token."""

    def shown(token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = table.token_bytes(token_id)
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": shown_logprob(logprob), "bytes": list(raw)}

    content = [
        {
            **shown(event.token_id, event.logprob),
            "top_logprobs": [shown(other, logprob) for other, logprob in event.top],
        }
        for event in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(delta: Delta, table: TokenTable) -> dict[str, Any]:
    """``logprobs`` of a completion choice or chunk; offsets count the answer's characters.

    A token that is not whole text is written ``bytes:\\xe2\\x80``, as OpenAI writes it, so
    that two of them stay two keys.
    """
    return {
        "tokens": [_token_name(table.token_bytes(event.token_id)) for event in delta.tokens],
        "token_logprobs": [shown_logprob(event.logprob) for event in delta.tokens],
        "top_logprobs": [
            {_token_name(table.token_bytes(other)): shown_logprob(lp) for other, lp in event.top}
            for event in delta.tokens
        ],
        "text_offset": list(delta.starts),
    }


def _token_name(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
