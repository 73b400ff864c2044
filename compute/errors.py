"""Typed errors of the compute plane."""

from __future__ import annotations


class ComputeError(Exception):
    """Base of what the compute plane raises on purpose."""


class BadLogits(ComputeError):
    """The model gave logits no token can be drawn from; ends one request, not the rank."""

    def __init__(self, num_nan: int, vocab_size: int) -> None:
        super().__init__(num_nan, vocab_size)
        self.num_nan, self.vocab_size = num_nan, vocab_size

    def __str__(self) -> str:
        return (
            f"the model gave no usable logits: {self.num_nan} of {self.vocab_size} are NaN. "
            "Its weights may be damaged: verify the model file."
        )
