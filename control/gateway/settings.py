"""What a gateway may be told from outside: limits, time-outs, clocks and randomness."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

MAX_BODY_BYTES = 8 * 2**20  # CONTRACT section 5: a body over 8 MB is refused with 413


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Fixed for the life of one gateway; every effect it needs is passed in here.

    Attributes:
        max_body_bytes: larger request bodies are refused with 413.
        receive_timeout_s: a request's head, and then its body, must come within this time.
        cors_origins: web pages that may ask: origins such as ``https://chat.example``, or ``*``.
        open_timeout_s: how long a request waits for a model that loads or recovers.
        write_timeout_s: a streaming client that takes nothing for this long is let go.
        close_timeout_s: a generation that is cancelled must be closed within this time.
        random_bits: source of the seed of a request that names none.
        now_s: wall clock, for ``created`` fields only.
        monotonic_s: clock of every measured duration.
        registry: Prometheus registry; one a gateway, so that two in a process do not mix.
    """

    max_body_bytes: int = MAX_BODY_BYTES
    receive_timeout_s: float = 60.0
    cors_origins: tuple[str, ...] = ()
    open_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    close_timeout_s: float = 2.0
    random_bits: Callable[[int], int] = secrets.randbits
    now_s: Callable[[], float] = time.time
    monotonic_s: Callable[[], float] = time.monotonic
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
