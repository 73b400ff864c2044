"""Whether the processes of peers on this host still run: asked every few milliseconds of a wait."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Mapping
from typing import Protocol

import psutil


class PeerWatch(Protocol):
    """Watches the processes that were alive when it was made, not their pids."""

    def ended(self) -> int | None:
        """A rank whose process has ended (a zombie has), or None. Takes microseconds."""
        ...

    def close(self) -> None:
        """Stop watching."""
        ...


class _ByPidFd:
    """Linux: a descriptor per process, readable once it has ended."""

    def __init__(self, pids: Mapping[int, int]) -> None:
        self._poll = select.poll()
        self._rank_of: dict[int, int] = {}
        self._gone: int | None = None
        for rank, pid in pids.items():
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._gone = rank
                continue
            self._rank_of[fd] = rank
            self._poll.register(fd, select.POLLIN)

    def ended(self) -> int | None:
        if self._gone is None:
            ready = self._poll.poll(0)
            if ready:
                self._gone = self._rank_of[ready[0][0]]
        return self._gone

    def close(self) -> None:
        for fd in self._rank_of:
            os.close(fd)
        self._rank_of.clear()
        self._poll = select.poll()


class _ByStartTime:
    """Elsewhere: pid and start time together name a process."""

    def __init__(self, pids: Mapping[int, int]) -> None:
        self._gone: int | None = None
        self._peers: dict[int, psutil.Process] = {}
        for rank, pid in pids.items():
            try:
                self._peers[rank] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                self._gone = rank

    def ended(self) -> int | None:
        if self._gone is None:
            for rank, process in self._peers.items():
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    self._gone = rank
                    break
        return self._gone

    def close(self) -> None:
        self._peers.clear()


def watch(pids: Mapping[int, int]) -> PeerWatch:
    """Watch processes of this host, by rank.

    A pid may have been given to somebody else before this call; so the caller must hear from
    every peer once more after it.
    """
    return _ByPidFd(pids) if sys.platform == "linux" else _ByStartTime(pids)


def describe(pid: int) -> str:
    """What a silent process does, for the message that reports it."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return f"process {pid} is gone"
    if status == psutil.STATUS_STOPPED:
        return f"process {pid} is stopped by a signal"
    return f"process {pid} is {status}"
