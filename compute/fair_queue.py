"""A queue in which keys take turns: first come, first served within a key."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Whoever asks a lot waits behind itself alone.

    A key that was empty comes last in the round, so that leaving and coming back gains nothing.
    """

    def __init__(self) -> None:
        self._items: dict[str, deque[T]] = {}  # in the order of the round; none is empty
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, key: str, item: T) -> None:
        """Put an item at the end of its key's line."""
        self._items.setdefault(key, deque()).append(item)
        self._length += 1

    def peek(self) -> T | None:
        """Whose turn it is; None when nobody waits."""
        return next(iter(self._items.values()))[0] if self._items else None

    def pop(self) -> T:
        """Take whose turn it is; its key has the next one after all others.

        Raises:
            IndexError: nobody waits.
        """
        if not self._items:
            raise IndexError("nobody waits")
        key, line = next(iter(self._items.items()))
        item = line.popleft()
        del self._items[key]
        if line:
            self._items[key] = line
        self._length -= 1
        return item

    def remove(self, key: str, wanted: Callable[[T], bool]) -> None:
        """Take out what waits under a key and is ``wanted``."""
        line = self._items.get(key)
        if line is None:
            return
        left = deque(item for item in line if not wanted(item))
        self._length -= len(line) - len(left)
        if left:
            self._items[key] = left  # keeps its place in the round
        else:
            del self._items[key]
