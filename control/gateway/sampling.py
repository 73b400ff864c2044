"""How the tokens of one request are drawn, in one form for every API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SEED_MODULUS = 2**64  # the engine's generator is keyed by 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a body says about it; the defaults change nothing about the model's distribution.

    Attributes:
        n: choices for each prompt.
        seed: of the first choice, the next ones count on; None draws one.
        logit_bias: by token id, written as a decimal number.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
