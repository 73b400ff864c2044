"""Times as Anthropic and Ollama write them."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(now_s: float) -> str:
    """RFC 3339 in UTC, of seconds since 1970."""
    return datetime.fromtimestamp(now_s, UTC).isoformat().replace("+00:00", "Z")
