"""What sizes are worked out from: how each tensor of a checkpoint is stored, and no more.

Whoever needs less of a tensor than a checkpoint gives asks for a protocol of this file;
``models.checkpoint.Checkpoint`` meets them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class TensorFormat(Protocol):
    """How one tensor is stored."""

    @property
    def kind(self) -> str:
        """A key of ``models.quant.KINDS``, or a format of ``models.weights_hf``."""
        ...

    @property
    def block_columns(self) -> int:
        """Columns that are stored together."""
        ...


class Stored(Protocol):
    """The formats of a model's tensors."""

    def tensor(self, name: str) -> TensorFormat:
        """One weight by canonical name."""
        ...


@dataclass(frozen=True, slots=True)
class Assumed:
    """A model that is not there yet, taken to be stored in one format throughout."""

    kind: str
    block_columns: int = 32

    def tensor(self, name: str) -> Assumed:
        """Any weight."""
        del name
        return self


class TensorSize(Protocol):
    """How large one tensor is in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of the whole tensor."""
        ...


class StoredSizes(Protocol):
    """The sizes of a model's tensors."""

    def tensor(self, name: str) -> TensorSize:
        """One weight by canonical name."""
        ...
