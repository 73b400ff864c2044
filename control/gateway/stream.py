"""A response that streams frames, and stops its source when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from control.gateway import errors
from control.gateway.disconnect import until_disconnect

log = structlog.get_logger(__name__)

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class FrameStream(Response):
    """Streams frames. The status waits for the first one, so that early errors have theirs.

    An error after the first frame becomes one last frame in the route's error shape.
    The source is closed in every case.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], *, write_timeout_s: float) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]  # as long as the stream lasts
        self._frames, self._write_timeout_s = frames, write_timeout_s

    def error_frame(self, path: str, error: errors.ApiError) -> bytes:
        """The last frame of a stream that fails."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises ClientGone when it leaves, or takes nothing for too long."""
        await until_disconnect(receive, self._serve(scope, receive, send))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        async with aclosing(self._frames) as frames:
            try:
                async for data in frames:
                    if not started:
                        started = True
                        await self._start(send)
                    await self._write(send, data)
            except errors.ClientGone:
                raise
            except Exception as exc:  # noqa: BLE001 - the HTTP edge: every error becomes an answer
                error = answer_to(exc, str(scope.get("state", {}).get("request_id", "")))
                if not started:
                    await errors.response_for(scope["path"], error)(scope, receive, send)
                    return
                await self._write(send, self.error_frame(scope["path"], error))
        if not started:
            await self._start(send)
        await self._write(send, b"", more=False)

    async def _start(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError as exc:
            raise errors.ClientGone from exc


def answer_to(exc: Exception, request_id: str) -> errors.ApiError:
    """What a client is told of an error in its stream; a bug of ours is logged, once, here."""
    error = errors.from_exception(exc)
    if error is None:
        log.error("stream_failed", request_id=request_id, trace=errors.trace_of(exc))
        error = errors.internal(request_id)
    return error
