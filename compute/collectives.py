"""What ranks can do together, and which backend lets them do it.

A group is one generation (epoch) of an instance's ranks. Every rank calls the same operations in
the same order from one thread. After :class:`PeerLost` the group is broken for everybody: close
it and join again under a new epoch; the process may stay.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from compute.errors import JoinRefused, PeerLost

__all__ = ["Backend", "Group", "JoinRefused", "PeerLost", "Rendezvous", "Tensor", "join"]

# A C-contiguous numpy array, a torch tensor where the backend is torch's, an mlx array on mlx.
Tensor: TypeAlias = Any
Shapes: TypeAlias = Sequence[tuple[int, ...]]
Backend = Literal["single", "shm", "gloo", "hosts", "nccl", "mlx"]


class Group(Protocol):
    """One rank's end of a group.

    Arrays that can change do so in place; each operation also returns its result. Sums are taken
    in rank order wherever it is in our hands (all but NCCL and mlx), so that all ranks hold the
    same bits, and the same bits on every run.
    """

    @property
    def backend(self) -> Backend:
        """What carries the data."""
        ...

    @property
    def rank(self) -> int:
        """This rank, ``0 <= rank < world_size``."""
        ...

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        ...

    @property
    def epoch(self) -> int:
        """Generation of the instance."""
        ...

    def all_reduce_sum(self, x: Tensor, *, timeout_s: float) -> Tensor:
        """Sum ``x`` over all ranks, in place; every rank gets the result.

        Args:
            x: float32, any shape, the same on all ranks.
            timeout_s: seconds before a silent peer counts as lost.

        Raises:
            PeerLost: a rank ended or did not come; whoever owns the group ends it.
            ValueError: the ranks disagree about the operation, or ``x`` cannot be summed here.
        """
        ...

    def all_gather(
        self, x: Tensor, *, shapes: Shapes | None = None, timeout_s: float
    ) -> list[Tensor]:
        """Everybody's ``x``, in rank order, as new arrays.

        Args:
            x: any type of number, the same type on all ranks.
            shapes: of every rank's ``x``, where they differ; None takes that of ``x`` for all.
        """
        ...

    def broadcast(self, x: Tensor, *, root: int, timeout_s: float) -> Tensor:
        """Fill ``x`` with that of rank ``root``. The root may return before the others have it."""
        ...

    def send(self, x: Tensor, *, to: int, timeout_s: float) -> None:
        """Hand ``x`` to a rank that receives an array of the same size.

        Messages of a pair of ranks keep their order. It may return before they are received, or
        wait until they are.
        """
        ...

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """Fill ``x`` with the next array that rank ``source`` sends here."""
        ...

    def barrier(self, *, timeout_s: float) -> None:
        """Return when all ranks have come."""
        ...

    def close(self) -> None:
        """Leave the group and free what it holds; a second call does nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where and as whom to join. Two of different instance or epoch never meet.

    Attributes:
        instance: secret id of the instance, ``epoch`` its generation. It leaves no process: ranks
            prove to each other that they know it, see :meth:`keyed`.
        use: what the group is for, as errors name it.
        hosts: for every rank, a name of its machine; ranks with equal names share memory.
        address: ``(host, tcp_port)`` of rank 0, as all ranks can reach it; not needed where all
            ranks share a host.
        ring: ``(host, tcp_port)`` of every rank, for mlx alone.
        timeout_s: seconds that the others have to come.
    """

    instance: str = field(repr=False)
    use: str = ""
    epoch: int
    rank: int
    hosts: tuple[str, ...]
    address: tuple[str, int] = ("127.0.0.1", 0)
    ring: tuple[tuple[str, int], ...] = ()
    timeout_s: float

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return len(self.hosts)

    @property
    def generation(self) -> str:
        """The epoch and the use, for errors."""
        return f"epoch {self.epoch}" + (f" of the {self.use} group" if self.use else "")

    def keyed(self, purpose: str, epoch: int | None = None) -> str:
        """What only ranks of this instance can name, and what does not tell its id.

        Args:
            purpose: one value proves nothing for another.
            epoch: another generation of the same instance.

        Returns:
            HMAC-SHA256 under the instance's id, in hexadecimal.
        """
        said = f"{purpose}/{self.epoch if epoch is None else epoch}"
        return hmac.new(self.instance.encode(), said.encode(), hashlib.sha256).hexdigest()

    def __post_init__(self) -> None:
        if not 0 <= self.rank < len(self.hosts):
            raise ValueError(f"rank {self.rank} is outside 0..{len(self.hosts) - 1}")
        if self.ring and len(self.ring) != len(self.hosts):
            raise ValueError(f"{len(self.ring)} ring addresses for {len(self.hosts)} ranks")

    def beside(self) -> tuple[int, ...]:
        """Ranks on this rank's host, itself among them, in order."""
        mine = self.hosts[self.rank]
        return tuple(rank for rank, host in enumerate(self.hosts) if host == mine)


def choose_backend(rendezvous: Rendezvous, device: str) -> Backend:
    """The fastest that serves: by device, then by who shares a host."""
    if rendezvous.world_size == 1:
        return "single"
    if device.startswith("cuda"):
        return "nccl"
    if device.startswith("mlx"):
        return "mlx"
    num_hosts = len(set(rendezvous.hosts))
    if num_hosts == 1:
        return "shm"
    return "gloo" if num_hosts == rendezvous.world_size else "hosts"


def join(
    rendezvous: Rendezvous,
    *,
    device: str = "cpu",
    backend: Backend | None = None,
    listener: socket.socket | None = None,
) -> Group:
    """Meet the other ranks; returns when all are here.

    Args:
        device: ``cpu``, ``cuda:N`` or ``mlx``: where the arrays live.
        backend: None chooses by ``device`` and ``hosts``. NCCL wants one GPU a rank: ranks that
            share a GPU ask for ``gloo``.
        listener: on rank 0, a bound socket at ``address`` that is listened on instead of a new
            one (so that a port number can be chosen by the system). It is taken over.

    Raises:
        PeerLost: somebody did not come within ``rendezvous.timeout_s``, or ended meanwhile.
        JoinRefused: the others are of another shape, or this process cannot join such a group.
    """
    try:
        return _join(rendezvous, device, backend or choose_backend(rendezvous, device), listener)
    except BaseException:
        if listener is not None:
            listener.close()
        raise


def _join(
    rendezvous: Rendezvous, device: str, backend: Backend, listener: socket.socket | None
) -> Group:
    if backend == "single":
        from compute.collectives_single import SingleGroup

        return SingleGroup(rendezvous)
    if backend == "shm":
        from compute.collectives_shm import ShmGroup

        return ShmGroup.join(rendezvous)
    if backend == "gloo":
        from compute.collectives_gloo import GlooGroup

        return GlooGroup.join(rendezvous, listener=listener)
    if backend == "hosts":
        from compute.collectives_host import HostsGroup

        return HostsGroup.join(rendezvous, listener=listener)
    if backend == "nccl":
        from compute.collectives_nccl import NcclGroup

        return NcclGroup.join(rendezvous, device=device, listener=listener)
    from compute.collectives_mlx import MlxGroup

    return MlxGroup.join(rendezvous, listener=listener)
