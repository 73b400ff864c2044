"""Newline-delimited JSON, as Ollama streams it."""

from __future__ import annotations

import json
from typing import Any

from control.gateway import errors
from control.gateway.stream import FrameStream


def line(data: Any) -> bytes:
    """One object on a line. ASCII alone: some clients also break lines at U+2028 and U+0085."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


class LineStream(FrameStream):
    """One object a line; a stream that fails ends with ``{"error": text}``."""

    media_type = "application/x-ndjson"

    def error_frame(self, path: str, error: errors.ApiError) -> bytes:
        return line(errors.body_for(path, error))
