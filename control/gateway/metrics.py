"""What the gateway counts and times, in Prometheus' terms; names as CONTRACT section 5."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.responses import Response

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 3, 10)
RECOVERY_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 10, 30, 60)


class Metrics:
    """Every metric of one gateway, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "phalanx_requests_total",
            "HTTP requests answered; status 499: the client left first.",
            ("route", "status"),
            registry=registry,
        )
        self.tokens = Counter(
            "phalanx_tokens_total",
            "Tokens taken in (prompt) and given out (completion).",
            ("kind",),
            registry=registry,
        )
        self.active = Gauge(
            "phalanx_active_generations",
            "Generations that run or wait now.",
            registry=registry,
        )
        self.first_token = Histogram(
            "phalanx_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "phalanx_inter_token_seconds",
            "Between two tokens of one generation, recoveries included.",
            buckets=INTER_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.recovery_pause = Histogram(
            "phalanx_recovery_pause_seconds",
            "From the loss of a rank to the first new token of its instance.",
            buckets=RECOVERY_BUCKETS_S,
            registry=registry,
        )
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    def router(self) -> APIRouter:
        """``GET /metrics``."""
        routes = APIRouter(tags=["service"])

        @routes.get("/metrics", response_class=Response, summary="Prometheus metrics")
        async def metrics() -> Response:
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

        return routes
