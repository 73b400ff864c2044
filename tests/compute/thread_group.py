"""Ranks as threads of one process: a group in memory, and a way to run them together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np

from compute.collectives import Backend, Group, Shapes, Tensor
from compute.errors import PeerLost

T = TypeVar("T")
WAIT_S = 60.0


class _Room:
    """What the ranks of a group share."""

    def __init__(self, world_size: int) -> None:
        self.door = threading.Barrier(world_size)
        self.given: list[Any] = [None] * world_size
        self.posts: dict[tuple[int, int], queue.Queue[Any]] = {
            (a, b): queue.Queue() for a in range(world_size) for b in range(world_size)
        }


class ThreadGroup:
    """A :class:`compute.collectives.Group` of threads, on numpy arrays or CPU tensors of torch."""

    backend: Final[Backend] = "shm"
    epoch: Final = 1

    def __init__(self, room: _Room, rank: int) -> None:
        self._room, self.rank = room, rank
        self.world_size = len(room.given)
        self.num_sums = 0

    def all_reduce_sum(self, x: Tensor, *, timeout_s: float) -> Tensor:
        """Sum of all ranks' float32 ``x``, in rank order, in place."""
        if np.asarray(x).dtype != np.float32:
            raise ValueError(f"sums are of float32 arrays, not {np.asarray(x).dtype}")
        self.num_sums += 1
        everybody = [np.asarray(part) for part in self._swap(x, timeout_s)]
        if len({part.shape for part in everybody}) != 1:
            raise ValueError(f"shapes differ: {[part.shape for part in everybody]}")
        total = everybody[0].copy()
        for part in everybody[1:]:
            total += part
        self._meet(timeout_s)  # everybody has read before anybody writes
        np.asarray(x)[...] = total
        return x

    def all_gather(
        self, x: Tensor, *, shapes: Shapes | None = None, timeout_s: float
    ) -> list[Tensor]:
        """Copies of everybody's ``x``, in rank order."""
        parts = self._swap(x, timeout_s)
        wanted = [x.shape] * self.world_size if shapes is None else shapes
        if [tuple(part.shape) for part in parts] != [tuple(shape) for shape in wanted]:
            raise ValueError(f"{[part.shape for part in parts]} instead of {wanted}")
        out = [part.copy() if isinstance(part, np.ndarray) else part.clone() for part in parts]
        self._meet(timeout_s)
        return out

    def broadcast(self, x: Tensor, *, root: int, timeout_s: float) -> Tensor:
        """Fill ``x`` with that of ``root``."""
        values = np.asarray(self._swap(x, timeout_s)[root]).copy()
        self._meet(timeout_s)
        np.asarray(x)[...] = values
        return x

    def send(self, x: Tensor, *, to: int, timeout_s: float) -> None:
        """Hand over a copy; returns at once."""
        self._room.posts[self.rank, to].put(np.array(x))

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """Fill ``x`` with what ``source`` sends next."""
        try:
            values = self._room.posts[source, self.rank].get(timeout=timeout_s)
        except queue.Empty:
            raise PeerLost(source, f"silent for {timeout_s:g} s") from None
        np.asarray(x)[...] = values.reshape(x.shape)
        return x

    def barrier(self, *, timeout_s: float) -> None:
        """Return when all ranks have come."""
        self._meet(timeout_s)

    def close(self) -> None:
        """Whoever waits for this rank learns that it is gone."""
        self._room.door.abort()

    def _swap(self, x: Tensor, timeout_s: float) -> list[Any]:
        self._room.given[self.rank] = x
        self._meet(timeout_s)
        return list(self._room.given)

    def _meet(self, timeout_s: float) -> None:
        try:
            self._room.door.wait(timeout_s)
        except threading.BrokenBarrierError:
            raise PeerLost(-1, "a thread has left, or did not come in time") from None


def thread_groups(world_size: int) -> list[Group]:
    """Every rank's end of one group."""
    room = _Room(world_size)
    return [ThreadGroup(room, rank) for rank in range(world_size)]


def together(calls: Sequence[Callable[[], T]], groups: Sequence[Group] = ()) -> list[T]:
    """Make calls at the same time, each in a thread of its own; their results, in order.

    Where one fails, its group's ranks fail with it, and what failed first is raised.
    """
    failures: list[BaseException] = []

    def made(rank: int) -> T:
        try:
            return calls[rank]()
        except BaseException as exc:
            failures.append(exc)
            if groups:
                groups[rank].close()
            raise

    with ThreadPoolExecutor(max_workers=max(1, len(calls))) as pool:
        futures = [pool.submit(made, rank) for rank in range(len(calls))]
        for future in futures:
            future.exception(timeout=WAIT_S)
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
