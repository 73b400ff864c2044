"""What steps take, measured: how much of a prompt fits beside running streams, how fast tokens
come, and how long a queue takes. Pure: times are told, no clock is read."""

from __future__ import annotations

from collections import deque
from typing import Final

LEAST_TOKENS: Final = 16  # of a prompt in a step: fewer would cost much of the kernels' speed
WEIGHT: Final = 0.25  # of the newest of similar steps
ENDS: Final = 32  # requests whose ends tell how fast a queue moves


class Pace:
    """Remembers the latest steps of one engine."""

    def __init__(self, *, target_s: float, most_tokens: int) -> None:
        """Nothing is known yet.

        Args:
            target_s: how long a step should take at most while streams run.
            most_tokens: of prompts in one step, however fast they run.
        """
        self._target_s, self._most = target_s, most_tokens
        self._decode_s: float | None = None  # a step without prompts
        self._prompt_token_s: float | None = None
        self._stream_token_s: float | None = None  # all streams together
        self._busy_s = 0.0  # sum of all steps
        self._ends_s: deque[float] = deque([0.0], maxlen=ENDS + 1)  # in busy time

    def ran(self, seconds: float, *, decodes: int, prefills: int) -> None:
        """A step took ``seconds`` for so many decoded tokens and so many of prompts."""
        self._busy_s += seconds
        if decodes:
            self._stream_token_s = _mean(self._stream_token_s, seconds / decodes)
        if not prefills:
            self._decode_s = _mean(self._decode_s, seconds)
        elif prefills >= LEAST_TOKENS:
            base_s = self._decode_s or 0.0 if decodes else 0.0
            each_s = max(seconds - base_s, 0.1 * seconds) / prefills
            self._prompt_token_s = _mean(self._prompt_token_s, each_s)

    def ended(self) -> None:
        """A request ran to its end."""
        self._ends_s.append(self._busy_s)

    def beside_tokens(self) -> int:
        """Tokens of prompts that keep a step within the target while streams run."""
        if self._prompt_token_s is None:
            return min(LEAST_TOKENS, self._most)
        left_s = self._target_s - (self._decode_s or 0.0)
        fit = int(left_s / self._prompt_token_s)
        return max(min(fit, self._most), min(LEAST_TOKENS, self._most))

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together, as of late; 0 where none has run."""
        return 1.0 / self._stream_token_s if self._stream_token_s else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Of prompts, beside what decodes; 0 where none has run."""
        return 1.0 / self._prompt_token_s if self._prompt_token_s else 0.0

    def wait_s(self, num_ends: int, *, prompt_tokens: int, answer_tokens: int) -> float:
        """How long until so many requests have ended.

        Args:
            num_ends: requests that must end.
            prompt_tokens: of all that wait or run, still to run.
            answer_tokens: most that the next of them to end can still take.

        Returns:
            By the time that the latest ends took each. Before there are any: for all prompts and
            the longest answer that is possible, so rather too long.
        """
        if num_ends < 1:
            return 0.0
        if len(self._ends_s) > 1:
            return num_ends * (self._busy_s - self._ends_s[0]) / (len(self._ends_s) - 1)
        prompts_s = prompt_tokens * (self._prompt_token_s or 0.0)
        return prompts_s + answer_tokens * (self._decode_s or 0.0)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
