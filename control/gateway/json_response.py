"""JSON answers that can always be sent, whatever a client wrote that they quote."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class Json(JSONResponse):
    """UTF-8 JSON; half a surrogate pair, which has no UTF-8, is sent as its escape."""

    def render(self, content: Any) -> bytes:
        """Bytes of one JSON value; NaN and infinities are bugs of ours."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")
