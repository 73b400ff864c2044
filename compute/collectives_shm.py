"""Collectives of CPU ranks of one host, through memory they share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from compute import peer_watch, shm_kernels
from compute.collectives import Backend, Rendezvous, Shapes, Tensor
from compute.errors import PeerLost
from compute.shm_memory import Memory, share

SLICE_S = 0.005  # between two looks at the peers' processes
_MANY_SPINS, _FEW_SPINS = 5_000, 100


class ShmGroup:
    """A :class:`compute.collectives.Group` on numpy arrays or CPU tensors of torch.

    A peer whose process ends is noticed within ``SLICE_S``; one that is silent, by the time-out.
    Whoever notices tells all others.

    Args:
        memory: ``shm_kernels.total_bytes(len(ranks))`` zeroed bytes, the same for all.
        ranks: who shares it, in order; errors name these. ``rank`` is one of them.
    """

    backend: Final[Backend] = "shm"

    def __init__(self, memory: Memory, *, ranks: tuple[int, ...], rank: int, epoch: int) -> None:
        self.rank = ranks.index(rank)
        self.world_size = len(ranks)
        self.epoch = epoch
        self._ranks, self._memory, self._base = ranks, memory, memory.address
        self._state: npt.NDArray[np.int64] = np.zeros(shm_kernels.STATE_WORDS, dtype=np.int64)
        self._state[shm_kernels.NUMBER] = 1
        self._state_address: int = self._state.ctypes.data
        enough_cores = self.world_size <= (os.cpu_count() or 1)
        self._spins = _MANY_SPINS if enough_cores else _FEW_SPINS
        self._slice_ns = int(SLICE_S * 1e9)
        self._words: npt.NDArray[np.int64] = memory.words()
        self._pids: dict[int, int] = {}
        self._watch = peer_watch.watch({})
        self._lost: PeerLost | None = None

    @classmethod
    def join(cls, rendezvous: Rendezvous) -> ShmGroup:
        """Meet the ranks of this host. Raises PeerLost, JoinRefused."""
        shm_kernels.compile_all()
        ranks = rendezvous.beside()
        deadline_s = time.monotonic() + rendezvous.timeout_s
        memory = share(
            group=rendezvous.keyed("memory"),
            epoch=rendezvous.epoch,
            ranks=ranks,
            rank=rendezvous.rank,
            size=shm_kernels.total_bytes(len(ranks)),
            timeout_s=rendezvous.timeout_s,
        )
        group = cls(memory, ranks=ranks, rank=rendezvous.rank, epoch=rendezvous.epoch)
        try:
            group._meet(deadline_s)
        except BaseException:
            group.close()
            raise
        return group

    def _meet(self, deadline_s: float) -> None:
        """Learn the peers' processes. The second barrier proves that none of them is stale."""
        self._words[self._fact(self.rank)] = os.getpid()
        self.barrier(timeout_s=max(0.0, deadline_s - time.monotonic()))
        others = (r for r in range(self.world_size) if r != self.rank)
        self._pids = {r: int(self._words[self._fact(r)]) for r in others}
        self._watch.close()
        self._watch = peer_watch.watch(self._pids)
        self.barrier(timeout_s=max(0.0, deadline_s - time.monotonic()))

    def all_reduce_sum(self, x: Tensor, *, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.all_reduce_sum`."""
        array = _in_place(x)
        if array.dtype != np.float32:
            raise ValueError(f"sums are of float32 arrays, not {array.dtype}")
        self._run(shm_kernels.all_reduce, timeout_s, array.ctypes.data, array.size)
        return x

    def all_gather(
        self, x: Tensor, *, shapes: Shapes | None = None, timeout_s: float
    ) -> list[Tensor]:
        """See :meth:`compute.collectives.Group.all_gather`."""
        array = np.ascontiguousarray(x)
        shapes = shapes if shapes is not None else [array.shape] * self.world_size
        if len(shapes) != self.world_size or tuple(shapes[self.rank]) != array.shape:
            raise ValueError(f"shapes={shapes} of {self.world_size} ranks, mine is {array.shape}")
        outs = [np.empty(shape, dtype=array.dtype) for shape in shapes]
        addresses = np.array([out.ctypes.data for out in outs], dtype=np.int64)
        sizes = np.array([out.nbytes for out in outs], dtype=np.int64)
        self._run(
            shm_kernels.all_gather,
            timeout_s,
            array.ctypes.data,
            addresses.ctypes.data,
            sizes.ctypes.data,
            int(sizes.max()),
        )
        return [_like(x, out) for out in outs]

    def broadcast(self, x: Tensor, *, root: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.broadcast`."""
        self._check(root)
        array = _in_place(x)
        self._run(shm_kernels.broadcast, timeout_s, array.ctypes.data, array.nbytes, root)
        return x

    def send(self, x: Tensor, *, to: int, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.send`; up to 256 KiB do not wait for the taker."""
        self._check(to, myself=False)
        array = np.ascontiguousarray(x)
        self._run(shm_kernels.send, timeout_s, array.ctypes.data, array.nbytes, to)

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.receive`."""
        self._check(source, myself=False)
        array = _in_place(x)
        self._run(shm_kernels.receive, timeout_s, array.ctypes.data, array.nbytes, source)
        return x

    def barrier(self, *, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.barrier`."""
        self._run(shm_kernels.all_gather, timeout_s, 0, 0, _NO_SIZES.ctypes.data, 0)

    def close(self) -> None:
        """See :meth:`compute.collectives.Group.close`. No operation may be running."""
        if self._base:
            self._words[self._fact(self.rank) + 1] = 1  # has left
            self._base = 0
            self._words = np.empty(0, dtype=np.int64)
            self._watch.close()
            self._memory.close()

    def report(self, lost: PeerLost) -> None:
        """Tell everybody that a rank is lost; it may be one of another host."""
        if self._base and self._words[0] == 0:
            self._words[0] = lost.rank + 2  # 1: nobody knows who
        self._lost = self._lost or PeerLost(lost.rank, lost.why)

    def _run(self, kernel: Callable[..., int], timeout_s: float, *arguments: int) -> None:
        """Call a kernel until it is done, looking at the peers in between."""
        if self._lost is not None:
            raise PeerLost(self._lost.rank, self._lost.why)
        if not self._base:
            raise PeerLost(self._ranks[self.rank], "this rank has left the group")
        state = self._state
        state[shm_kernels.AT] = state[shm_kernels.PHASE] = 0
        place = (self._base, self._state_address, self.rank, self.world_size)
        deadline_s = time.monotonic() + timeout_s
        spins, slice_ns = self._spins, min(self._slice_ns, int(timeout_s * 1e9))
        last_try = False
        while True:
            waiting = kernel(*place, *arguments, spins, slice_ns)
            if waiting == shm_kernels.DONE:
                return
            if waiting == shm_kernels.MISMATCH:
                self._mismatch()
            lost = self._reported() if waiting == shm_kernels.LOST else self._look(waiting)
            if lost is not None and (last_try or waiting == shm_kernels.LOST):
                self._give_up(lost)
            # It may have done its part just before it ended: then this finds everything there.
            last_try = lost is not None
            left_s = deadline_s - time.monotonic()
            if lost is None and left_s <= 0:
                self._give_up(self._silent(waiting, timeout_s))
            spins, slice_ns = 0, 0 if last_try else min(self._slice_ns, int(left_s * 1e9) + 1)

    def _look(self, waiting: int) -> PeerLost | None:
        """Signs that the rank waited for, or any other, is no more."""
        if self._words[self._fact(waiting) + 1]:
            return PeerLost(self._ranks[waiting], "it has left the group")
        ended = self._watch.ended()
        if ended is None:
            return None
        return PeerLost(self._ranks[ended], f"its process {self._pids[ended]} has ended")

    def _silent(self, waiting: int, timeout_s: float) -> PeerLost:
        pid = self._pids.get(waiting) or int(self._words[self._fact(waiting)])
        doing = peer_watch.describe(pid) if pid else "its process is unknown"
        return PeerLost(self._ranks[waiting], f"silent for {timeout_s:g} s; {doing}")

    def _reported(self) -> PeerLost:
        rank = int(self._words[0]) - 2
        if rank == self._ranks[self.rank]:
            return PeerLost(rank, "the other ranks found this one silent and gave it up")
        return PeerLost(rank, "another rank of this host reported it")

    def _give_up(self, lost: PeerLost) -> NoReturn:
        self.report(lost)
        raise lost

    def _mismatch(self) -> NoReturn:
        who = self._ranks[int(self._state[shm_kernels.WHO])]
        self.report(PeerLost(self._ranks[self.rank], f"it did not do what rank {who} did"))
        raise ValueError(
            f"rank {self._ranks[self.rank]} and rank {who} do not do the same: every rank must "
            "call the same operations in the same order with arrays of the same size"
        )

    def _fact(self, rank: int) -> int:
        return shm_kernels.line_offset(rank, shm_kernels.FACTS) // 8

    def _check(self, rank: int, *, myself: bool = True) -> None:
        if not 0 <= rank < self.world_size or (rank == self.rank and not myself):
            raise ValueError(f"rank {self.rank} of {self.world_size} cannot do this with {rank}")


_NO_SIZES: npt.NDArray[np.int64] = np.zeros(4096, dtype=np.int64)


def _in_place(x: Tensor) -> npt.NDArray[Any]:
    """The memory of ``x`` as an array."""
    array = x if isinstance(x, np.ndarray) else np.asarray(x)
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError("the array must be writeable and C-contiguous: it is changed in place")
    return array


def _like(x: Tensor, array: npt.NDArray[Any]) -> Tensor:
    """``array`` as what the caller gave."""
    if isinstance(x, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array)
