"""What is refused before a route sees it: bodies too large, too slow, or not JSON. Pure ASGI."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control.gateway.errors import ApiError, response_for

DRAIN_FACTOR = 8  # times the limit: what is read and thrown away so that the client sees its 413
DRAIN_S = 5.0


class BodyLimit:
    """Refuses a body over ``max_bytes`` with 413, declared or chunked, and a foreign type with 415.

    A body that is not whole within ``timeout_s`` gets 408. The type matters beyond manners: a web
    page can make a browser post text/plain anywhere, but needs our consent (which only those of
    ``http.cors_origins`` have) to post JSON.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isascii() and declared.isdecimal() else 0
        if size > self._max_bytes:
            if "expect" not in headers and size <= DRAIN_FACTOR * self._max_bytes:
                await drain(receive, size)
            await self._refuse(scope, receive, send)
            return
        has_body = size > 0 or "transfer-encoding" in headers
        if has_body and not _is_json(headers.get("content-type", "")):
            error = ApiError(
                415, "the body must be JSON: send Content-Type: application/json.", code="not_json"
            )
            await response_for(scope["path"], error)(scope, receive, send)
            return
        seen, whole = 0, False
        until_s = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()  # tells of the client's end alone
            try:
                async with asyncio.timeout_at(until_s):
                    message = await receive()
            except TimeoutError as exc:
                raise self._too_slow() from exc
            whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                await drain(receive, DRAIN_FACTOR * self._max_bytes)
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_slow(self) -> ApiError:
        text = f"the body did not come within {self._timeout_s:g} s; send it again."
        return ApiError(408, text, code="body_too_slow", headers={"Connection": "close"})

    def _too_large(self) -> ApiError:
        text = f"the body is larger than {self._max_bytes} bytes; send a shorter prompt."
        headers = {"Connection": "close"}
        return ApiError(413, text, code="body_too_large", headers=headers)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await response_for(scope["path"], self._too_large())(scope, receive, send)


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind.startswith("application/") and kind.endswith(("/json", "+json"))


async def drain(receive: Receive, max_bytes: int) -> None:
    """Throw away the rest of a body: an answer sent over unread bytes is lost to a reset."""
    try:
        async with asyncio.timeout(DRAIN_S):
            while max_bytes > 0:
                message = await receive()
                max_bytes -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
