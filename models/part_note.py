"""The note beside a model of which only parts are on this disk: which, and what the whole is.

Its files have their full size with holes in them; a hole reads as zeros, so whoever reads a
weight of such a model must know that it is here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PART_NOTE: Final = "phalanx-parts.json"
OWN_NOTES: Final = ("phalanx.json", PART_NOTE)  # of the store's, not of the model's


@dataclass(frozen=True, slots=True)
class PartNote:
    """``have``: half-open ranges of bytes by file name; ``fingerprint``: of the whole model."""

    fingerprint: str
    have: dict[str, tuple[tuple[int, int], ...]]

    def lacks(self, name: str, start: int, stop: int) -> bool:
        """Whether any of these bytes of a file is a hole."""
        return not any(low <= start and stop <= high for low, high in self.have.get(name, ()))


def read_note(folder: Path) -> PartNote | None:
    """The note of a model's folder; None where the model is whole."""
    try:
        note = json.loads((folder / PART_NOTE).read_text(encoding="utf-8"))
        have = {
            str(name): tuple((int(start), int(stop)) for start, stop in ranges)
            for name, ranges in note["have"].items()
        }
        return PartNote(str(note["fingerprint"]), have)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return PartNote("", {})  # damaged: nothing is known to be here
