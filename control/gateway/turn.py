"""One turn of a conversation, in one form for every API."""

from __future__ import annotations

from typing import NamedTuple


class Turn(NamedTuple):
    """Who said what; ``developer`` is the newer name of the role ``system``."""

    role: str
    text: str
