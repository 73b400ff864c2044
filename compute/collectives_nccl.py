"""Collectives of CUDA ranks, one GPU each, by NCCL."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Hashable
from typing import Any, Final

import torch
import torch.distributed

from compute.call_thread import CallThread
from compute.collectives import Backend, Rendezvous, Shapes, Tensor
from compute.errors import JoinRefused, PeerLost
from compute.rendezvous_store import interface_of, meet, own_address, reason

dist: Any = torch.distributed  # parts of it are not in its type information
_SPIN_S, _NAP_S = 0.001, 0.0002
_ABORT_S = 5.0  # NCCL may wait for a communicator that is still being made
_EVERYBODY = -1


class NcclGroup:
    """A :class:`compute.collectives.Group` on tensors of one GPU.

    NCCL itself tells neither who is silent nor that anybody is: every operation is polled until
    its time-out, then the communicator is aborted. Errors name rank -1.

    The first operation among some ranks (all of them, or two that send and receive) makes their
    communicator, which blocks until all have come: it starts on a thread that is left behind when
    it takes too long. After such a loss the process should end. What NCCL does when it is
    aborted meanwhile needs two GPUs to try, and has not been tried.
    """

    backend: Final[Backend] = "nccl"

    def __init__(
        self, group: Any, store: Any, rendezvous: Rendezvous, device: torch.device
    ) -> None:
        self.rank, self.world_size = rendezvous.rank, rendezvous.world_size
        self.epoch = rendezvous.epoch
        self._group, self._store, self._device = group, store, device
        self._patience = Patience("nccl")
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
            _bind(rendezvous)
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
        self._run(lambda group: group.send([x], to, 0), timeout_s, peer=to)

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.receive`."""
        self._run(lambda group: group.recv([x], source, 0), timeout_s, peer=source)
        return x

    def barrier(self, *, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.barrier`."""
        self.all_reduce_sum(torch.zeros(1, device=self._device), timeout_s=timeout_s)

    def close(self) -> None:
        """See :meth:`compute.collectives.Group.close`."""
        self._patience.close()
        if self._group is not None:
            aborting = CallThread("nccl-abort")
            with contextlib.suppress(TimeoutError, RuntimeError):  # there is no more to be done
                aborting.run(self._group.abort, _ABORT_S)
            aborting.close()
        self._group = None

    def _run(
        self, start: Callable[[Any], Any], timeout_s: float, *, peer: int = _EVERYBODY
    ) -> None:
        if self._lost is not None:
            raise PeerLost(self._lost.rank, self._lost.why)
        if self._group is None:
            raise PeerLost(self.rank, "this rank has left the group")
        group, stream = self._group, torch.cuda.current_stream(self._device)

        def begin() -> Any:
            with torch.cuda.stream(stream):  # a thread has a device and a stream of its own
                return start(group)

        try:
            self._patience.run(begin, timeout_s, communicator=peer)
        except PeerLost as lost:
            self._lost = PeerLost(lost.rank, lost.why)  # that one holds what it passed through
            self.close()
            raise


def _bind(rendezvous: Rendezvous) -> None:
    """Keep NCCL's sockets on the interface that leads to rank 0: by itself it takes the first.

    Source: NCCL's guide, ``NCCL_SOCKET_IFNAME``; ``=`` asks for exactly this name.
    """
    if len(set(rendezvous.hosts)) > 1 and (name := interface_of(own_address(rendezvous))):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


class Patience:
    """Starts operations that run by themselves, and waits until they are done: not for ever."""

    def __init__(self, name: str) -> None:
        self._thread = CallThread(name)
        self._made: set[Hashable] = set()

    def run(self, start: Callable[[], Any], timeout_s: float, *, communicator: Hashable) -> None:
        """Return when an operation is done.

        Args:
            start: returns a torch ``Work``; may block where its communicator is new.
            communicator: names it.

        Raises:
            PeerLost: it failed or took longer than ``timeout_s``. No other may follow.
        """
        start_s = time.monotonic()
        try:
            if communicator in self._made:  # a switch of threads costs as much as a small sum
                work = start()
            else:
                work = self._thread.run(start, timeout_s)
                self._made.add(communicator)
            while not work.is_completed():
                waited_s = time.monotonic() - start_s
                if waited_s > timeout_s:
                    raise TimeoutError
                time.sleep(_NAP_S if waited_s > _SPIN_S else 0)
            work.wait()  # orders the current stream behind it; raises what went wrong
        except TimeoutError as exc:
            raise PeerLost(-1, f"silent for {timeout_s:g} s") from exc
        except RuntimeError as exc:
            raise PeerLost(-1, reason(exc)) from exc

    def close(self) -> None:
        """End the thread."""
        self._thread.close()
