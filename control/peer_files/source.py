"""A peer that takes part in a fetch, and what is asked of peers over their nodes' connection."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol

from control.peer_files.board import Run
from control.peer_files.chunks import MAX_RUN_CHUNKS, covered
from control.peer_files.offer import Offer

LEAST_RUN_CHUNKS: Final = 4
QUICK_RUN_S: Final = 0.2
SLOW_RUN_S: Final = 1.0


class Peers(Protocol):
    """What a pull asks of peers over their nodes' connection. Called by any thread."""

    def offer(self, peer: str) -> Offer:
        """A fresh offer, with tokens. Raises ControlError."""
        ...

    def look(self, peer: str) -> Offer:
        """What a peer has now, without tokens, or quickly nothing. Raises ControlError."""
        ...

    def fellows(self, known: Collection[str]) -> Sequence[str]:
        """Other nodes that have something of the model, fetching it themselves perhaps."""
        ...

    def digests(self, peers: Sequence[str], run: Run) -> Future[bytes]:
        """Digests of a run's chunks from the first of ``peers`` that gives them.

        The future raises ControlError.
        """
        ...


@dataclass(slots=True, eq=False)
class Source:
    """One peer that takes part.

    Attributes:
        have: chunks of each file that it has; None for all.
        tokens: those that have not been used.
        idle: lines to it that have nothing to do.
        run_chunks: how many are asked of it at once: as many as come in a fraction of a second.
        kept: runs it has brought.
        bad_runs: runs with a chunk that was not what its digest says.
        why: why it no longer takes part.
    """

    peer: str
    offer: Offer
    have: Mapping[str, set[int]] | None
    tokens: list[bytes]
    idle: int = 0
    run_chunks: int = LEAST_RUN_CHUNKS
    kept: int = 0
    bad_runs: int = 0
    why: str = ""

    def pace(self, run: Run, took_s: float) -> None:
        """A run has come within so many seconds."""
        if took_s > SLOW_RUN_S:
            self.run_chunks = max(LEAST_RUN_CHUNKS, run.count // 2)
        elif took_s < QUICK_RUN_S and run.count >= self.run_chunks:
            self.run_chunks = min(MAX_RUN_CHUNKS, 2 * self.run_chunks)

    def has(self, name: str, chunk: int) -> bool:
        """Whether it can give a chunk of a file."""
        return self.have is None or chunk in self.have.get(name, ())


def source_of(peer: str, offer: Offer) -> Source:
    """A peer that takes part with what it offers."""
    return Source(peer, offer, chunks_of(offer), list(offer.tokens))


def chunks_of(offer: Offer) -> Mapping[str, set[int]] | None:
    """Chunks that an offer is of; None for all."""
    if offer.have is None:
        return None
    sizes = dict(offer.files)
    return {name: covered(ranges, sizes[name]) for name, ranges in offer.have.items()}
