"""Responses kept for ``previous_response_id``: in memory, on this node, and not for ever."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from control.gateway.turn import Turn

MAX_KEPT = 1000
MAX_KEPT_CHARS = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Kept:
    """A response as JSON, and the conversation up to and with it."""

    shown: bytes
    turns: tuple[Turn, ...]
    owner: str = ""  # id of the API key that asked; empty where none was needed

    @property
    def num_chars(self) -> int:
        """Text held; what several responses share counts for each of them."""
        return len(self.shown) + sum(len(turn.text) for turn in self.turns)


class ResponseStore:
    """The latest responses; those unused for longest are dropped when there are too many.

    Args:
        max_kept, max_chars: how many responses, and how much text in all of them.
    """

    def __init__(self, max_kept: int = MAX_KEPT, max_chars: int = MAX_KEPT_CHARS) -> None:
        self._max_kept, self._max_chars = max_kept, max_chars
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._num_chars = 0

    def put(self, id: str, kept: Kept) -> None:
        """Keep a response; one that alone is too large is not kept."""
        if kept.num_chars > self._max_chars:
            return
        self._kept[id] = kept
        self._num_chars += kept.num_chars
        while len(self._kept) > self._max_kept or self._num_chars > self._max_chars:
            _, dropped = self._kept.popitem(last=False)
            self._num_chars -= dropped.num_chars

    def get(self, id: str, owner: str = "") -> Kept | None:
        """A response that is still kept and was made with the key ``owner``, or None."""
        kept = self._kept.get(id)
        if kept is None or kept.owner != owner:
            return None
        self._kept.move_to_end(id)
        return kept

    def remove(self, id: str, owner: str = "") -> bool:
        """Forget a response of ``owner``; False if there is none."""
        kept = self.get(id, owner)
        if kept is not None:
            del self._kept[id]
            self._num_chars -= kept.num_chars
        return kept is not None

    def __len__(self) -> int:
        return len(self._kept)
