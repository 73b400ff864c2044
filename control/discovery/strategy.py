"""What a discovery strategy is: something that can be asked, again and again, whom it sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from control.discovery.candidates import Candidate


class Strategy(Protocol):
    """One way to see nodes. ``period_s``: seconds between two looks."""

    name: str
    period_s: float

    async def look(self) -> Sequence[Candidate]:
        """All that is seen now, those that may not be joined too. May raise OSError."""
        ...

    async def stop(self) -> None:
        """Give up what is held. Never raises."""
        ...
