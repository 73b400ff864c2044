"""What outlives the epochs of an instance on one machine."""

from __future__ import annotations

from dataclasses import dataclass

MAX_EPOCHS_WITHOUT_PROGRESS = 5


@dataclass(slots=True)
class History:
    """What outlives an epoch: it is how a group that never gets anywhere is told from one
    that is killed again and again while it works."""

    epoch: int = 0
    epochs_without_progress: int = 0
    last_error: str = ""

    def note(self, why: str) -> None:
        """Remember what ended the latest epoch."""
        self.last_error = why

    def exhausted(self) -> bool:
        return self.epochs_without_progress >= MAX_EPOCHS_WITHOUT_PROGRESS
