"""The group of one rank: everything is done already."""

from __future__ import annotations

from copy import copy
from typing import Final

from compute.collectives import Backend, Rendezvous, Shapes, Tensor


class SingleGroup:
    """A :class:`compute.collectives.Group` with nobody else in it."""

    backend: Final[Backend] = "single"
    rank: Final = 0
    world_size: Final = 1

    def __init__(self, rendezvous: Rendezvous) -> None:
        if rendezvous.world_size != 1:
            raise ValueError(f"{rendezvous.world_size} ranks cannot be one")
        self.epoch = rendezvous.epoch

    def all_reduce_sum(self, x: Tensor, *, timeout_s: float) -> Tensor:
        """``x`` as it is."""
        return x

    def all_gather(
        self, x: Tensor, *, shapes: Shapes | None = None, timeout_s: float
    ) -> list[Tensor]:
        """A copy of ``x``."""
        if shapes is not None and [tuple(shape) for shape in shapes] != [tuple(x.shape)]:
            raise ValueError(f"shapes={shapes} for one array of {tuple(x.shape)}")
        return [copy(x)]

    def broadcast(self, x: Tensor, *, root: int, timeout_s: float) -> Tensor:
        """``x`` as it is."""
        self._nobody(root, allowed=0)
        return x

    def send(self, x: Tensor, *, to: int, timeout_s: float) -> None:
        """Raises ValueError: there is nobody."""
        self._nobody(to)

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """Raises ValueError: there is nobody."""
        self._nobody(source)

    def barrier(self, *, timeout_s: float) -> None:
        """Everybody is here."""

    def close(self) -> None:
        """Nothing is held."""

    def _nobody(self, rank: int, allowed: int = -1) -> None:
        if rank != allowed:
            raise ValueError(f"there is no rank {rank} to talk to in a group of one")
