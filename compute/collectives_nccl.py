"""Collectives of CUDA ranks, one GPU each, by NCCL."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed

from compute.collectives import Backend, Rendezvous, Shapes, Tensor
from compute.errors import JoinRefused, PeerLost
from compute.rendezvous_store import meet, reason

dist: Any = torch.distributed  # parts of it are not in its type information
_SPIN_S, _NAP_S = 0.001, 0.0002


class NcclGroup:
    """A :class:`compute.collectives.Group` on tensors of one GPU.

    NCCL itself tells neither who is silent nor that anybody is: every operation is polled until
    its time-out, then the communicator is aborted. Errors name rank -1.
    """

    backend: Final[Backend] = "nccl"

    def __init__(
        self, group: Any, store: Any, rendezvous: Rendezvous, device: torch.device
    ) -> None:
        self.rank, self.world_size = rendezvous.rank, rendezvous.world_size
        self.epoch = rendezvous.epoch
        self._group, self._store, self._device = group, store, device
        self._lost: PeerLost | None = None

    @classmethod
    def join(
        cls, rendezvous: Rendezvous, *, device: str, listener: socket.socket | None = None
    ) -> NcclGroup:
        """Meet all ranks. Raises PeerLost, JoinRefused."""
        if not torch.cuda.is_available() or not dist.is_nccl_available():
            raise JoinRefused("NCCL needs a CUDA device and a build of torch with NCCL")
        # Torch's watchdog would end the process on an error: here it is a PeerLost.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        deadline_s = time.monotonic() + rendezvous.timeout_s
        place = torch.device(device if ":" in device else f"{device}:0")
        try:
            store, prefix = meet(rendezvous, deadline_s, listener)
            group = dist.ProcessGroupNCCL(
                dist.PrefixStore(f"{prefix}/nccl", store),
                rendezvous.rank,
                rendezvous.world_size,
                dist.ProcessGroupNCCL.Options(),
            )
        except RuntimeError as exc:
            raise PeerLost(-1, f"joining failed: {reason(exc)}") from exc
        joined = cls(group, store, rendezvous, place)
        try:
            joined.barrier(timeout_s=max(0.001, deadline_s - time.monotonic()))
        except BaseException:
            joined.close()
            raise
        return joined

    def all_reduce_sum(self, x: Tensor, *, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.all_reduce_sum`; any floating type."""
        self._run(lambda group: group.allreduce([x]), timeout_s)
        return x

    def all_gather(
        self, x: Tensor, *, shapes: Shapes | None = None, timeout_s: float
    ) -> list[Tensor]:
        """See :meth:`compute.collectives.Group.all_gather`."""
        shapes = shapes if shapes is not None else [tuple(x.shape)] * self.world_size
        if len(shapes) != self.world_size or tuple(shapes[self.rank]) != tuple(x.shape):
            raise ValueError(f"shapes={shapes} of {self.world_size} ranks, mine: {x.shape}")
        outs = [torch.empty(tuple(s), dtype=x.dtype, device=self._device) for s in shapes]
        outs[self.rank].copy_(x)
        deadline_s = time.monotonic() + timeout_s
        for root, out in enumerate(outs):  # shapes differ: one broadcast each
            left_s = max(0.001, deadline_s - time.monotonic())
            if out.numel():
                self.broadcast(out, root=root, timeout_s=left_s)
        return outs

    def broadcast(self, x: Tensor, *, root: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.broadcast`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        self._run(lambda group: group.broadcast([x], options), timeout_s)
        return x

    def send(self, x: Tensor, *, to: int, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.send`."""
        self._run(lambda group: group.send([x], to, 0), timeout_s)

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.receive`."""
        self._run(lambda group: group.recv([x], source, 0), timeout_s)
        return x

    def barrier(self, *, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.barrier`."""
        self.all_reduce_sum(torch.zeros(1, device=self._device), timeout_s=timeout_s)

    def close(self) -> None:
        """See :meth:`compute.collectives.Group.close`."""
        if self._group is not None:
            self._group.abort()
        self._group = None

    def _run(self, start: Callable[[Any], Any], timeout_s: float) -> None:
        if self._lost is not None:
            raise PeerLost(self._lost.rank, self._lost.why)
        if self._group is None:
            raise PeerLost(self.rank, "this rank has left the group")
        start_s = time.monotonic()
        try:
            work = start(self._group)
            while not work.is_completed():
                waited_s = time.monotonic() - start_s
                if waited_s > timeout_s:
                    self._give_up(f"silent for {timeout_s:g} s")
                time.sleep(_NAP_S if waited_s > _SPIN_S else 0)
            work.wait()  # orders the current stream behind it; raises what went wrong
        except RuntimeError as exc:
            self._give_up(reason(exc))

    def _give_up(self, why: str) -> None:
        self._lost = PeerLost(-1, why)
        self.close()
        raise self._lost
