"""Around every request: its id, its count, and an answer even to a bug of ours. Pure ASGI."""

from __future__ import annotations

import re
import secrets

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control.gateway import errors
from control.gateway.metrics import Metrics
from control.gateway.settings import GatewaySettings

log = structlog.get_logger(__name__)

CLIENT_GONE = 499  # nginx's word for it; counted, never sent
MAX_REQUEST_ID = 64


def request_id_from(given: str) -> str:
    """The client's own id, cut to what is safe in a log line; a new one where that is nothing."""
    return re.sub(r"[^A-Za-z0-9._-]", "", given)[:MAX_REQUEST_ID] or secrets.token_hex(8)


class Edge:
    """Outermost layer. ``request.state`` gets ``request_id`` and ``arrived_s``."""

    def __init__(self, app: ASGIApp, *, settings: GatewaySettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_from(Headers(scope=scope).get("x-request-id", ""))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["arrived_s"] = self._settings.monotonic_s()
        status = CLIENT_GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except errors.ClientGone:
            log.info("client_gone", request_id=request_id, path=scope["path"])
        except Exception as exc:  # the last resort: a bug of ours, logged once, here
            trace = errors.trace_of(exc)
            log.error("request_failed", request_id=request_id, path=scope["path"], trace=trace)
            if status != CLIENT_GONE:
                raise  # the answer has begun; the connection must break
            response = errors.response_for(scope["path"], errors.internal(request_id))
            await response(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests.labels(route, str(status)).inc()
