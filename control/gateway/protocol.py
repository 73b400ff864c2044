"""uvicorn's HTTP protocol with limits on a request's head: its size, and the time it may take."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from control.gateway.errors import ApiError, openai_body

MAX_HEAD_BYTES: Final = 64 * 1024


class LimitedProtocol(H11Protocol):
    """Ends a connection on which a request's head does not come whole in time.

    A class attribute says how long, because uvicorn makes the instances: see ``limited``.
    """

    head_timeout_s: float = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head_timer is None:  # the next request on a connection that was kept
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:  # one that came meanwhile was taken up at once
            self._stop_waiting()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; the error has its status, which uvicorn does not pass on."""
        fault = sys.exc_info()[1]
        status = int(getattr(fault, "error_status_hint", 400) or 400)
        if status == 431:
            msg = f"the head of the request is larger than {MAX_HEAD_BYTES} bytes."
        self._refuse(ApiError(status, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(openai_body(error)).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            status = error.status_code
            reason = STATUS_PHRASES[status]
            answer = h11.Response(status_code=status, headers=headers, reason=reason)
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            text = f"no request came within {self.head_timeout_s:g} s."
            self._refuse(ApiError(408, text, code="head_too_slow"))


def limited(head_timeout_s: float) -> type[LimitedProtocol]:
    """The protocol with this limit."""
    return type("Protocol", (LimitedProtocol,), {"head_timeout_s": head_timeout_s})
