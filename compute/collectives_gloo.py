"""Collectives over TCP between CPU ranks of any hosts."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

from compute.collectives import Backend, Rendezvous, Shapes, Tensor
from compute.errors import PeerLost
from compute.gloo_mesh import GlooMesh, Message

ONE_SHOT_BYTES = 64 * 1024
LARGE_BYTES = 64 * 1024  # beyond it a message may be in flight when a rank dies
_TAGS = 1 << 28  # collectives count below it, messages of a pair above
_TRAILERS, _RECEIPTS = 2 * _TAGS, 4 * _TAGS  # added to those


class GlooGroup:
    """A :class:`compute.collectives.Group` on torch tensors or numpy arrays.

    Tensors of a GPU go through the host's memory. A dead peer is noticed when its connection
    closes; a silent one, and one behind a cut link, by the time-out. Who notices leaves, so that
    those who wait for it notice as well: these may name it instead.

    When a peer dies, gloo wakes those who wait for a message to begin, but neither the sender nor
    the receiver of one that is on its way. So a large message is followed by a byte, its trailer,
    and answered by another, its receipt: who waits for these first, is woken.

    Args:
        members: ranks of the mesh that are in this group, this one among them; all by default.
    """

    backend: Final[Backend] = "gloo"

    def __init__(self, mesh: GlooMesh, members: tuple[int, ...] | None = None) -> None:
        self._mesh = mesh
        self._members = members or tuple(range(mesh.world_size))
        self.rank = self._members.index(mesh.rank)
        self.world_size = len(self._members)
        self.epoch = mesh.epoch
        self._number = 0
        self._sent = [0] * self.world_size
        self._received = [0] * self.world_size
        self._lost: PeerLost | None = None

    @classmethod
    def join(cls, rendezvous: Rendezvous, *, listener: socket.socket | None = None) -> GlooGroup:
        """Meet all ranks. Raises PeerLost, JoinRefused."""
        return cls(GlooMesh(rendezvous, listener=listener))

    def all_reduce_sum(self, x: Tensor, *, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.all_reduce_sum`; also float16 and bfloat16, whose
        sums are made in float32 and rounded once."""
        deadline_s = time.monotonic() + timeout_s
        mine = _host(x).reshape(-1)
        if not mine.is_floating_point():
            raise ValueError(f"sums are of floats, not {mine.dtype}")
        everybody = range(self.world_size)
        whole = torch.empty((self.world_size, mine.numel()), dtype=mine.dtype)
        if self.world_size == 2 or mine.nbytes <= ONE_SHOT_BYTES:
            self._exchange(
                dict.fromkeys(everybody, mine), {r: whole[r] for r in everybody}, deadline_s
            )
            mine.copy_(_total(whole))
            return _give_back(x, mine)
        num = mine.numel()
        bounds = [num * r // self.world_size for r in range(self.world_size + 1)]
        parts = {r: mine[bounds[r] : bounds[r + 1]] for r in everybody}
        slices = whole.reshape(-1)[: self.world_size * parts[self.rank].numel()]
        slices = slices.reshape(self.world_size, -1)
        self._exchange(parts, {r: slices[r] for r in everybody}, deadline_s)
        parts[self.rank].copy_(_total(slices))
        self._exchange(dict.fromkeys(everybody, parts[self.rank]), parts, deadline_s)
        return _give_back(x, mine)

    def all_gather(
        self, x: Tensor, *, shapes: Shapes | None = None, timeout_s: float
    ) -> list[Tensor]:
        """See :meth:`compute.collectives.Group.all_gather`."""
        mine = _host(x)
        shapes = shapes if shapes is not None else [tuple(mine.shape)] * self.world_size
        if len(shapes) != self.world_size or tuple(shapes[self.rank]) != tuple(mine.shape):
            raise ValueError(f"shapes={shapes} of {self.world_size} ranks, mine: {mine.shape}")
        outs = [torch.empty(tuple(shape), dtype=mine.dtype) for shape in shapes]
        everybody = range(self.world_size)
        deadline_s = time.monotonic() + timeout_s
        self._exchange(dict.fromkeys(everybody, mine), dict(enumerate(outs)), deadline_s)
        if isinstance(x, np.ndarray):
            return [out.numpy() for out in outs]
        return [out.to(x.device) for out in outs]

    def broadcast(self, x: Tensor, *, root: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.broadcast`."""
        self._check(root)
        mine = _host(x)
        deadline_s = time.monotonic() + timeout_s
        if self.rank == root:
            self._exchange(dict.fromkeys(range(self.world_size), mine), {}, deadline_s)
            return x
        self._exchange({}, {root: mine}, deadline_s)
        return _give_back(x, mine)

    def send(self, x: Tensor, *, to: int, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.send`.

        A large array has been received when this returns, a small one has left.
        """
        self._check(to, myself=False)
        tag = _TAGS + self._sent[to] % _TAGS
        self._sent[to] += 1
        self._transfer({to: _host(x)}, {}, tag, time.monotonic() + timeout_s)

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.receive`."""
        self._check(source, myself=False)
        mine = _host(x)
        tag = _TAGS + self._received[source] % _TAGS
        self._received[source] += 1
        self._transfer({}, {source: mine}, tag, time.monotonic() + timeout_s)
        return _give_back(x, mine)

    def barrier(self, *, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.barrier`."""
        words = torch.zeros((self.world_size, 1), dtype=torch.uint8)
        everybody = {r: words[r] for r in range(self.world_size)}
        mine = dict.fromkeys(range(self.world_size), words[self.rank])
        self._exchange(mine, everybody, time.monotonic() + timeout_s)

    def close(self) -> None:
        """See :meth:`compute.collectives.Group.close`."""
        self._mesh.close()

    def _exchange(
        self,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Tensor],
        deadline_s: float,
    ) -> None:
        """One step of a collective: something to and from other ranks; my own is copied."""
        self._number += 1
        self._transfer(outgoing, incoming, self._number % _TAGS, deadline_s)

    def _transfer(
        self,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Tensor],
        tag: int,
        deadline_s: float,
    ) -> None:
        if self._lost is not None:
            raise PeerLost(self._lost.rank, self._lost.why)
        mesh, me = self._mesh, self.rank
        there = {peer: x for peer, x in outgoing.items() if peer != me and x.numel()}
        back = {peer: x for peer, x in incoming.items() if peer != me and x.numel()}
        try:
            trailers, arriving, leaving = [], [], []
            for peer, x in back.items():
                arriving.append(self._receive(x, peer, tag))
                if x.nbytes > LARGE_BYTES:
                    trailers.append(self._receive(_byte(), peer, _TRAILERS + tag))
            for peer, x in there.items():
                if x.nbytes > LARGE_BYTES:
                    leaving.append(self._receive(_byte(), peer, _RECEIPTS + tag))
            for peer, x in there.items():
                leaving.append(self._send(x, peer, tag))
                if x.nbytes > LARGE_BYTES:
                    leaving.append(self._send(_byte(), peer, _TRAILERS + tag))
            if me in incoming and incoming[me].data_ptr() != outgoing[me].data_ptr():
                incoming[me].copy_(outgoing[me])
            for message in (*trailers, *arriving):
                mesh.finish(message, deadline_s)
            for peer, x in back.items():
                if x.nbytes > LARGE_BYTES:
                    leaving.append(self._send(_byte(), peer, _RECEIPTS + tag))
            for message in leaving:  # receipts are the first of them
                mesh.finish(message, deadline_s)
        except PeerLost as lost:
            self._lost = PeerLost(lost.rank, lost.why)  # that one holds what it passed through
            mesh.close()
            raise

    def _send(self, x: torch.Tensor, peer: int, tag: int) -> Message:
        return self._mesh.send(x, self._members[peer], tag)

    def _receive(self, x: torch.Tensor, peer: int, tag: int) -> Message:
        return self._mesh.receive(x, self._members[peer], tag)

    def _check(self, rank: int, *, myself: bool = True) -> None:
        if not 0 <= rank < self.world_size or (rank == self.rank and not myself):
            raise ValueError(f"rank {self.rank} of {self.world_size} cannot do this with {rank}")


def _byte() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def _total(rows: torch.Tensor) -> torch.Tensor:
    """Sum over the first dimension, in its order."""
    total = rows[0].to(torch.float32) if rows.dtype.itemsize < 4 else rows[0].clone()
    for row in rows[1:]:
        total += row
    return total.to(rows.dtype)


def _host(x: Tensor) -> torch.Tensor:
    """``x`` as a contiguous CPU tensor: the same memory where it is that already."""
    tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    if not tensor.is_contiguous():
        raise ValueError("the array must be C-contiguous: it is changed in place")
    return tensor.detach().cpu()


def _give_back(x: Tensor, result: torch.Tensor) -> Tensor:
    """``x`` with the result in it."""
    if not isinstance(x, np.ndarray) and x.device.type != "cpu":
        x.copy_(result.reshape(x.shape))
    return x
