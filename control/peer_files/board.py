"""Which chunks are still to come, and who fetches which next. One lock, no I/O.

Work is given out in *runs*, some chunks in a row of one file. A run that a peer could not give is
never given to that peer again; once nothing else is left, runs that have been under way for long
are given out a second time, so that one slow peer does not hold up the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from control.peer_files.chunks import MAX_RUN_CHUNKS, rows_of

MAX_COPIES: Final = 2  # of one run under way
LONG_S: Final = 2.0  # under way, for another copy


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` chunks of a file from ``first`` on."""

    name: str
    first: int
    count: int

    @property
    def chunks(self) -> range:
        """Their numbers."""
        return range(self.first, self.first + self.count)


Has = Callable[[str, int], bool]  # whether a peer has a chunk of a file


@dataclass(slots=True, eq=False)
class _Entry:
    run: Run
    taken: list[str] = field(default_factory=list)  # by whom, now
    refused: set[str] = field(default_factory=set)  # who cannot give it
    taken_s: float = 0.0  # when it was last given out


class Board:
    """Shared by the threads that fetch."""

    def __init__(
        self,
        missing: Mapping[str, Sequence[int]],
        *,
        begin: float = 0.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            missing: chunks of each file.
            begin: where in it to begin, from 0 to 1: machines that fetch the same at a time begin
                at different places, so that they can give to each other.
        """
        self._changed, self._now_s = threading.Condition(), now_s
        runs = [
            _Entry(Run(name, row.start, len(row)))
            for name, found in missing.items()
            for row in rows_of(found, MAX_RUN_CHUNKS)
        ]
        first = int(begin * len(runs))
        self._open = runs[first:] + runs[:first]

    def take(self, peer: str, has: Has, most: int = MAX_RUN_CHUNKS) -> Run | None:
        """A run for ``peer``; None while there is none for it.

        A run that nobody fetches yet is cut to what the peer has of it, and to ``most`` chunks.
        """
        with self._changed:
            able = [e for e in self._open if peer not in e.refused and peer not in e.taken]
            now_s = self._now_s()
            for copies in range(MAX_COPIES):
                for entry in able:
                    if copies and now_s - entry.taken_s < LONG_S:
                        continue
                    if len(entry.taken) == copies and (found := self._cut(entry, has, most)):
                        found.taken.append(peer)
                        found.taken_s = now_s
                        return found.run
            return None

    def _cut(self, entry: _Entry, has: Has, most: int) -> _Entry | None:
        """The part of an entry that a peer can give, which is an entry of its own from now on."""
        run = entry.run
        there = rows_of(chunk for chunk in run.chunks if has(run.name, chunk))
        if not there:
            return None
        if len(there[0]) == run.count and (entry.taken or run.count <= most):
            return entry
        if entry.taken:
            return None
        first = there[0]
        there[:1] = [row for row in (first[:most], first[most:]) if row]
        lacking = sorted(set(run.chunks) - {chunk for row in there for chunk in row})
        at = self._open.index(entry)
        self._open[at : at + 1] = [
            _Entry(Run(run.name, row.start, len(row)), refused=set(entry.refused))
            for row in (*there, *rows_of(lacking))
        ]
        return self._open[at]

    def needs(self, run: Run) -> bool:
        """Whether nobody else has brought it meanwhile."""
        with self._changed:
            return any(entry.run == run for entry in self._open)

    def done(self, run: Run, peer: str, bad: Sequence[int] = ()) -> None:
        """All chunks of a run are here but the ``bad`` ones, which ``peer`` cannot give."""
        with self._changed:
            for entry in [e for e in self._open if e.run == run]:
                self._open.remove(entry)
                for row in rows_of(bad):
                    left = _Entry(Run(run.name, row.start, len(row)))
                    left.refused = entry.refused | {peer}
                    self._open.append(left)
            self._changed.notify_all()

    def give_back(self, run: Run, peer: str) -> None:
        """``peer`` did not get to it; it may try again."""
        with self._changed:
            for entry in self._open:
                if entry.run == run and peer in entry.taken:
                    entry.taken.remove(peer)
            self._changed.notify_all()

    def is_empty(self) -> bool:
        """Whether everything is here."""
        with self._changed:
            return not self._open

    def is_hopeless(self, peer: str, has: Has) -> bool:
        """Whether ``peer`` can give nothing of what is left."""
        with self._changed:
            return all(
                peer in entry.refused
                or not any(has(entry.run.name, chunk) for chunk in entry.run.chunks)
                for entry in self._open
            )

    def wait(self, timeout_s: float) -> None:
        """For another thread's news."""
        with self._changed:
            self._changed.wait(timeout_s)

    def wake(self) -> None:
        """End all waits: there is news from elsewhere."""
        with self._changed:
            self._changed.notify_all()
