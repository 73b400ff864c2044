"""Typed errors of the compute plane."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence


class ComputeError(Exception):
    """Base of what the compute plane raises on purpose; ``kind`` is what remote callers see."""

    kind = "compute_error"


class BadRequest(ValueError):
    """A key of a term is missing, unknown or of the wrong type; the text names it."""

    kind = "bad_order"


class BadLogits(ComputeError):
    """The model gave logits no token can be drawn from; ends one request, not the rank."""

    kind = "bad_logits"

    def __init__(self, num_nan: int, vocab_size: int) -> None:
        super().__init__(num_nan, vocab_size)
        self.num_nan, self.vocab_size = num_nan, vocab_size

    def __str__(self) -> str:
        return (
            f"the model gave no usable logits: {self.num_nan} of {self.vocab_size} are NaN. "
            "Its weights may be damaged: verify the model file."
        )


class GrammarFailed(ComputeError):
    """An answer cannot go on within the form that was asked of it; ends one request."""

    kind = "grammar_failed"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the grammar of this request cannot go on: {self.why}"


class PeerLost(ComputeError):
    """A rank of the group ended or fell silent; the group is of no more use, its epoch is over.

    Attributes:
        rank: who, as far as this rank can tell; -1 where the transport does not say.
        why: the sign that was seen.
    """

    kind = "peer_lost"

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(rank, why)
        self.rank, self.why = rank, why

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.rank >= 0 else "a rank"
        return f"{who} is lost: {self.why}. Join again under a new epoch."


@contextlib.contextmanager
def numbered_as(ranks: Sequence[int]) -> Iterator[None]:
    """Losses within the block are told by the mesh's numbers of a group's members."""
    try:
        yield
    except PeerLost as lost:
        known = 0 <= lost.rank < len(ranks)
        raise PeerLost(ranks[lost.rank] if known else lost.rank, lost.why) from lost


class JoinRefused(ComputeError):
    """This rank does not belong to the group it tried to join, or cannot join one."""

    kind = "join_refused"


class OutOfMemory(ComputeError):
    """The system refused memory for a rank."""

    kind = "out_of_memory"

    def __init__(self, what: str, need_bytes: int) -> None:
        super().__init__(what, need_bytes)
        self.what, self.need_bytes = what, need_bytes

    def __str__(self) -> str:
        return (
            f"no memory for {self.what}: {self.need_bytes / 2**30:.1f} GiB. "
            "Load with less context or fewer slots, or pick a smaller quantization."
        )
