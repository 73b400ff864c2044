"""Collectives of CPU ranks on several hosts, some of them on one: memory inside, TCP between."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from compute.collectives import Backend, Rendezvous, Shapes, Tensor
from compute.collectives_gloo import GlooGroup
from compute.collectives_shm import ShmGroup
from compute.collectives_single import SingleGroup
from compute.errors import PeerLost
from compute.gloo_mesh import GlooMesh

# Ranks that wait for their leader, who waits for other hosts, let it report whom it missed.
GRACE_S = 0.1


class HostsGroup:
    """A :class:`compute.collectives.Group` of two levels.

    The first rank of every host is its leader: sums are made inside each host, then between the
    leaders, then handed out. Single messages go straight. When a rank is lost, ranks of other
    hosts may name its leader instead.
    """

    backend: Final[Backend] = "hosts"

    def __init__(
        self, rendezvous: Rendezvous, inside: ShmGroup | SingleGroup, mesh: GlooMesh
    ) -> None:
        self.rank, self.world_size = rendezvous.rank, rendezvous.world_size
        self.epoch = rendezvous.epoch
        self._inside, self._mesh = inside, mesh
        self._beside = rendezvous.beside()
        self._leader_of = [rendezvous.hosts.index(host) for host in rendezvous.hosts]
        self._leaders = tuple(sorted(set(self._leader_of)))
        self._all = GlooGroup(mesh)
        leads = self.rank in self._leaders
        self._between = GlooGroup(mesh, self._leaders) if leads else None
        self._lost: PeerLost | None = None

    @classmethod
    def join(cls, rendezvous: Rendezvous, *, listener: socket.socket | None = None) -> HostsGroup:
        """Meet the ranks of this host, then all. Raises PeerLost, JoinRefused."""
        alone = len(rendezvous.beside()) == 1
        with contextlib.ExitStack() as stack:
            inside = (
                SingleGroup(_only(rendezvous)) if alone else ShmGroup.join(rendezvous)
            )  # fmt: skip
            stack.callback(inside.close)
            mesh = GlooMesh(rendezvous, listener=listener)
            stack.pop_all()
        return cls(rendezvous, inside, mesh)

    def all_reduce_sum(self, x: Tensor, *, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.all_reduce_sum`; host sums are added in order."""
        with self._operation(timeout_s) as deadline_s:
            self._inside.all_reduce_sum(x, timeout_s=_left(deadline_s))
            if self._between is not None:
                self._between.all_reduce_sum(x, timeout_s=_left(deadline_s))
            return self._hand_out(x, deadline_s)

    def all_gather(
        self, x: Tensor, *, shapes: Shapes | None = None, timeout_s: float
    ) -> list[Tensor]:
        """See :meth:`compute.collectives.Group.all_gather`."""
        given = x if isinstance(x, np.ndarray) else np.asarray(x)
        shapes = [tuple(s) for s in shapes] if shapes else [given.shape] * self.world_size
        if len(shapes) != self.world_size or shapes[self.rank] != given.shape:
            raise ValueError(f"shapes={shapes} of {self.world_size} ranks, mine is {given.shape}")
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        with self._operation(timeout_s) as deadline_s:
            near = self._inside.all_gather(
                np.ascontiguousarray(given).reshape(-1),
                shapes=[(sizes[rank],) for rank in self._beside],
                timeout_s=_left(deadline_s),
            )
            order = [r for leader in self._leaders for r in self._ranks_of(leader)]
            packed = np.empty(sum(sizes), dtype=given.dtype)
            if self._between is not None:
                hosts = self._between.all_gather(
                    np.concatenate(near),
                    shapes=[
                        (sum(sizes[rank] for rank in self._ranks_of(leader)),)
                        for leader in self._leaders
                    ],
                    timeout_s=_left(deadline_s),
                )
                packed[:] = np.concatenate(hosts)
            self._hand_out(packed, deadline_s)
        starts = dict(zip(order, np.cumsum([0] + [sizes[r] for r in order]), strict=False))
        outs = [
            packed[starts[r] : starts[r] + sizes[r]].reshape(shapes[r])
            for r in range(self.world_size)
        ]
        if isinstance(x, np.ndarray):
            return outs
        import torch

        return [torch.from_numpy(out) for out in outs]

    def broadcast(self, x: Tensor, *, root: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.broadcast`."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"there is no rank {root} among {self.world_size}")
        with self._operation(timeout_s) as deadline_s:
            if root in self._beside:
                self._inside.broadcast(
                    x, root=self._beside.index(root), timeout_s=_left(deadline_s)
                )
            if self._between is not None:
                host = self._leaders.index(self._leader_of[root])
                self._between.broadcast(x, root=host, timeout_s=_left(deadline_s))
            return x if root in self._beside else self._hand_out(x, deadline_s)

    def send(self, x: Tensor, *, to: int, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.send`."""
        with self._operation(timeout_s):
            if to in self._beside:
                self._inside.send(x, to=self._beside.index(to), timeout_s=timeout_s)
            else:
                self._all.send(x, to=to, timeout_s=timeout_s)

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.receive`."""
        with self._operation(timeout_s):
            if source in self._beside:
                near = self._beside.index(source)
                return self._inside.receive(x, source=near, timeout_s=timeout_s)
            return self._all.receive(x, source=source, timeout_s=timeout_s)

    def barrier(self, *, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.barrier`."""
        with self._operation(timeout_s) as deadline_s:
            self._inside.barrier(timeout_s=_left(deadline_s))
            if self._between is not None:
                self._between.barrier(timeout_s=_left(deadline_s))
            self._inside.barrier(timeout_s=_left(deadline_s + GRACE_S))

    def close(self) -> None:
        """See :meth:`compute.collectives.Group.close`."""
        self._inside.close()
        self._mesh.close()

    def _hand_out(self, x: Tensor, deadline_s: float) -> Tensor:
        """From the leader, who has it from other hosts, to the others of its host."""
        return self._inside.broadcast(x, root=0, timeout_s=_left(deadline_s + GRACE_S))

    def _ranks_of(self, leader: int) -> list[int]:
        return [r for r in range(self.world_size) if self._leader_of[r] == leader]

    @contextlib.contextmanager
    def _operation(self, timeout_s: float) -> Iterator[float]:
        """Runs one operation; a loss is told to both levels."""
        if self._lost is not None:
            raise PeerLost(self._lost.rank, self._lost.why)
        try:
            yield time.monotonic() + timeout_s
        except PeerLost as lost:
            self._lost = PeerLost(lost.rank, lost.why)  # that one holds what it passed through
            if isinstance(self._inside, ShmGroup):
                self._inside.report(lost)
            self._mesh.close()  # other hosts notice
            raise


def _only(rendezvous: Rendezvous) -> Rendezvous:
    """This rank by itself."""
    return Rendezvous(
        instance=rendezvous.instance,
        use=rendezvous.use,
        epoch=rendezvous.epoch,
        rank=0,
        hosts=(rendezvous.hosts[rendezvous.rank],),
        timeout_s=rendezvous.timeout_s,
    )


def _left(deadline_s: float) -> float:
    return max(0.001, deadline_s - time.monotonic())
