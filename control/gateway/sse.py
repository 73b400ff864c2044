"""Server-sent events."""

from __future__ import annotations

import json
from typing import Any

from control.gateway import errors
from control.gateway.stream import FrameStream

DONE = b"data: [DONE]\n\n"


def frame(data: Any, *, event: str | None = None) -> bytes:
    """One event. ASCII alone: some clients also break lines at U+2028 and U+0085."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode()


class EventStream(FrameStream):
    """Events as OpenAI sends them; a stream that fails ends with an error and no ``[DONE]``."""

    media_type = "text/event-stream"

    def error_frame(self, path: str, error: errors.ApiError) -> bytes:
        return frame(errors.body_for(path, error))


class NamedEventStream(EventStream):
    """Events with names, as Anthropic sends them; an error is one named ``error``."""

    def error_frame(self, path: str, error: errors.ApiError) -> bytes:
        return frame(errors.body_for(path, error), event="error")
