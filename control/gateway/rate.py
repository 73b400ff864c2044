"""A token bucket: how many requests a minute, with a truthful time to wait. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ROUNDING: Final = 1e-6  # who waited exactly as long as told must be served


@dataclass(frozen=True, slots=True)
class Bucket:
    """``tokens`` at the time ``at_s``; one whole token is one request."""

    tokens: float
    at_s: float


def take(bucket: Bucket | None, per_minute: int, now_s: float) -> tuple[Bucket, float]:
    """Take one request out of ``bucket`` (None: a full one, which holds a minute's worth).

    Returns:
        The bucket, and 0.0 if there was one; else the seconds until there will be one.
    """
    per_s = per_minute / 60
    if bucket is None:
        tokens = float(per_minute)
    else:
        gained = max(0.0, now_s - bucket.at_s) * per_s
        tokens = min(float(per_minute), bucket.tokens + gained)
    if tokens >= 1 - ROUNDING:
        return Bucket(max(0.0, tokens - 1), now_s), 0.0
    return Bucket(tokens, now_s), (1 - tokens) / per_s
