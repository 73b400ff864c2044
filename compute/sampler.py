"""How the next token is drawn from logits: a pure function of its arguments.

Randomness is counter based: the Philox generator keyed by ``(seed, index)`` gives the one number
that token ``index`` needs. So a token depends neither on the batch it rode in nor on a restart.

Order of the steps: logit bias, penalties, mask of the grammar, temperature, top-k, top-p, min-p,
draw. Log-probabilities are those of the model itself: log-softmax of the raw logits, before any of
these steps. So under a grammar they say what the model wanted, and the likeliest tokens may be some
that the mask forbids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from compute.errors import BadLogits

FloatArray = npt.NDArray[np.float32]
_WORD = (1 << 64) - 1
MIN_TEMPERATURE: Final = 1e-6  # below it nothing but the peak has any weight


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request wants its tokens drawn.

    Attributes:
        temperature: 0 takes the likeliest token; ties go to the lowest id.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: keep so many of the likeliest; 0 keeps all. Ties with the last one stay.
        min_p: drop tokens less likely than this share of the likeliest; 0 drops none.
        presence_penalty: subtracted from the logit of every token generated so far.
        frequency_penalty: subtracted once for each time a token was generated.
        repetition_penalty: logits of tokens in prompt or answer are divided by it when positive,
            multiplied when negative; 1 does nothing.
        logit_bias: added to the logits of these token ids; ids beyond the vocabulary are
            refused by :func:`sample`.
        seed: any integer; its low 64 bits count.

    Source: presence, frequency and bias as in OpenAI's API reference; repetition as in Keskar et
    al. 2019 (CTRL).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values without a meaning. Raises ValueError naming the field."""
        checks = {
            "temperature": self.temperature >= 0,
            "top_p": 0 <= self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, ok in checks.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)} is out of range")


class Sampled(NamedTuple):
    """A drawn token; ``logprob`` is NaN and ``top`` empty unless log-probabilities were asked."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


def sample(
    logits: FloatArray,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    index: int,
    *,
    logprobs: int | None = None,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> Sampled:
    """Draw token ``index`` of an answer.

    Args:
        logits: float32 ``(vocab,)``, not changed.
        params: how to draw.
        prompt_ids: used by the repetition penalty alone.
        generated_ids: used by the penalties.
        index: which token of the answer this is, counted from 0.
        logprobs: None for none; n for the drawn token's and those of the n likeliest.
        allowed: bool ``(vocab,)``, what a grammar lets come next; None where there is none.

    Raises:
        BadLogits: a logit is NaN or +inf, or no token is possible.
        ValueError: a biased id is outside the vocabulary.
    """
    greedy_id = int(logits.argmax())  # a NaN is found too: argmax returns the first one
    if not np.isfinite(logits[greedy_id]):
        raise BadLogits(int(np.isnan(logits).sum()), logits.shape[0])
    scores = _adjusted(logits, params, prompt_ids, generated_ids)
    if allowed is not None:
        scores = np.where(allowed, scores, np.float32(-np.inf))
    if params.temperature == 0:
        token_id = greedy_id if scores is logits else int(scores.argmax())
    else:
        token_id = _draw(scores, params, index, allowed)
    if allowed is not None and not (allowed[token_id] and np.isfinite(scores[token_id])):
        raise BadLogits(int(np.isnan(logits).sum()), logits.shape[0])
    if logprobs is None:
        return Sampled(token_id, float("nan"), [])
    return _with_logprobs(logits, token_id, logprobs)


def _adjusted(
    logits: FloatArray,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
) -> FloatArray:
    """Bias and penalties on a copy; the same array when there are none."""
    scores = logits
    if params.logit_bias:
        scores = logits.copy()
        for token_id, bias in params.logit_bias.items():
            if not 0 <= token_id < logits.shape[0]:
                raise ValueError(f"logit_bias: token id {token_id} is outside the vocabulary")
            scores[token_id] += bias
    if params.repetition_penalty != 1 and (prompt_ids or generated_ids):
        scores = logits.copy() if scores is logits else scores
        seen = np.unique(np.asarray((*prompt_ids, *generated_ids), dtype=np.int64))
        old = scores[seen]
        scores[seen] = np.where(
            old > 0, old / params.repetition_penalty, old * params.repetition_penalty
        )
    if (params.presence_penalty or params.frequency_penalty) and generated_ids:
        scores = logits.copy() if scores is logits else scores
        seen, times = np.unique(np.asarray(generated_ids, dtype=np.int64), return_counts=True)
        scores[seen] -= (params.presence_penalty + params.frequency_penalty * times).astype(
            np.float32
        )
    return scores


def _draw(
    scores: FloatArray,
    params: SamplingParams,
    index: int,
    allowed: npt.NDArray[np.bool_] | None,
) -> int:
    """Inverse of the cumulative distribution, in order of ids.

    Order of ids, not of probability: two nearly equal tokens that swap places by rounding then
    change the answer only if the drawn number falls between them.
    """
    kept = np.arange(scores.shape[0]) if allowed is None else np.flatnonzero(allowed)
    if 0 < params.top_k < kept.shape[0]:
        at = kept.shape[0] - params.top_k
        mine = scores[kept]
        kept = kept[mine >= np.partition(mine, at)[at]]
    weights = scores[kept].astype(np.float64)
    # The peak goes first: a tiny temperature would make every quotient infinite.
    weights = np.exp((weights - weights.max()) / max(params.temperature, MIN_TEMPERATURE))
    if params.top_p < 1:
        falling = np.sort(weights)[::-1]
        reached = np.cumsum(falling)
        last = int(np.searchsorted(reached, params.top_p * reached[-1]))
        inside = weights >= falling[min(last, falling.shape[0] - 1)]
        kept, weights = kept[inside], weights[inside]
    if params.min_p > 0:
        inside = weights >= params.min_p  # the likeliest token has weight 1
        kept, weights = kept[inside], weights[inside]
    reached = np.cumsum(weights)
    if not np.isfinite(reached[-1]):
        raise BadLogits(int(np.isnan(scores).sum()), scores.shape[0])
    key = np.array([params.seed & _WORD, index & _WORD], dtype=np.uint64)
    number = np.random.Generator(np.random.Philox(key=key)).random()
    at = int(np.searchsorted(reached, number * reached[-1], side="right"))
    return int(kept[min(at, kept.shape[0] - 1)])


def _with_logprobs(logits: FloatArray, token_id: int, num_top: int) -> Sampled:
    wide = logits.astype(np.float64)
    peak = wide.max()
    log_total = peak + np.log(np.exp(wide - peak).sum())
    top: list[tuple[int, float]] = []
    if num_top > 0:
        num_top = min(num_top, wide.shape[0])
        best = np.argpartition(-wide, num_top - 1)[:num_top]
        best = best[np.lexsort((best, -wide[best]))]
        top = [(int(i), float(wide[i] - log_total)) for i in best]
    return Sampled(token_id, float(wide[token_id] - log_total), top)
