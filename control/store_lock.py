"""One process, and one thread of it, writes to a model of the store at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import filelock

from control.fetch import Cancelled

LOCK_POLL_S: Final = 0.1


@contextlib.contextmanager
def locked(
    lock_file: Path, cancelled: threading.Event, while_waiting: Callable[[], None]
) -> Iterator[None]:
    """Hold the lock; ``while_waiting`` is called again and again until then.

    Raises:
        Cancelled: it was wanted no longer before it was had.
    """
    lock = filelock.FileLock(lock_file)
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except filelock.Timeout:
            while_waiting()
            if cancelled.wait(LOCK_POLL_S):
                raise Cancelled from None
    try:
        yield
    finally:
        lock.release()
