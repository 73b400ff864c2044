"""Collectives of MLX ranks, by its ring over TCP.

The ring has no time-outs, no epochs, and a process joins it once: so the ranks meet by other means
first, every operation runs on a thread of its own that can be left behind, and after a loss the
process must end. A peer that dies in the very moment of joining ends the others' processes.

A ring cannot be split, nor a process be in two: it serves where the tensor ranks are the whole
mesh. In other meshes sums of MLX stages, and always what goes from stage to stage, take host
arrays over shared memory or gloo.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from compute.call_thread import CallThread
from compute.collectives import Backend, Rendezvous, Shapes, Tensor
from compute.errors import JoinRefused, PeerLost

_joined = False


class MlxGroup:
    """A :class:`compute.collectives.Group` on mlx arrays, or on numpy arrays in place.

    Mlx arrays do not change: results are new arrays. Errors name rank -1.
    """

    backend: Final[Backend] = "mlx"

    def __init__(self, rendezvous: Rendezvous, ring: Any, thread: CallThread) -> None:
        self.rank, self.world_size = rendezvous.rank, rendezvous.world_size
        self.epoch = rendezvous.epoch
        self._ring, self._thread = ring, thread
        self._lost: PeerLost | None = None

    @classmethod
    def join(cls, rendezvous: Rendezvous, *, listener: socket.socket | None = None) -> MlxGroup:
        """Meet all ranks. Raises PeerLost, JoinRefused."""
        global _joined
        if importlib.util.find_spec("mlx") is None:
            raise JoinRefused("mlx is not installed here: install the extra `mlx`")
        from compute.mlx.meeting import meet

        if _joined:
            raise JoinRefused("a process joins an mlx ring once: start a new one")
        if len(rendezvous.ring) != rendezvous.world_size:
            raise JoinRefused("an mlx ring needs the address of every rank")
        deadline_s = time.monotonic() + rendezvous.timeout_s
        meet(rendezvous, deadline_s, listener)
        _joined = True
        ring = _init(rendezvous, max(0.001, deadline_s - time.monotonic()))
        group = cls(rendezvous, ring, CallThread("mlx-ring"))
        group.barrier(timeout_s=max(0.001, deadline_s - time.monotonic()))
        return group

    def all_reduce_sum(self, x: Tensor, *, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.all_reduce_sum`; any floating type of mlx."""
        return self._run(x, lambda mx, a: mx.distributed.all_sum(a, group=self._ring), timeout_s)

    def all_gather(
        self, x: Tensor, *, shapes: Shapes | None = None, timeout_s: float
    ) -> list[Tensor]:
        """See :meth:`compute.collectives.Group.all_gather`."""
        shapes = shapes if shapes is not None else [tuple(x.shape)] * self.world_size
        if len(shapes) != self.world_size or tuple(shapes[self.rank]) != tuple(x.shape):
            raise ValueError(f"shapes={shapes} of {self.world_size} ranks, mine: {x.shape}")
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]

        def gather(mx: Any, a: Any) -> Any:
            flat = mx.pad(a.reshape(-1), (0, max(sizes) - a.size))  # all must be equally long
            return mx.distributed.all_gather(flat[None], group=self._ring)

        whole = self._run(x, gather, timeout_s, in_place=False)
        return [
            whole[r, :size].reshape(shape)
            for r, (size, shape) in enumerate(zip(sizes, shapes, strict=True))
        ]

    def broadcast(self, x: Tensor, *, root: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.broadcast`; the ring adds zeros to the root's."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"there is no rank {root} among {self.world_size}")

        def spread(mx: Any, a: Any) -> Any:
            given = a if self.rank == root else mx.zeros_like(a)
            return mx.distributed.all_sum(given, group=self._ring)

        return self._run(x, spread, timeout_s)

    def send(self, x: Tensor, *, to: int, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.send`; the ring reaches its neighbours alone."""
        self._check_neighbour(to)
        self._run(
            x, lambda mx, a: mx.distributed.send(a, to, group=self._ring), timeout_s, in_place=False
        )

    def receive(self, x: Tensor, *, source: int, timeout_s: float) -> Tensor:
        """See :meth:`compute.collectives.Group.receive`; the ring reaches its neighbours alone."""
        self._check_neighbour(source)
        return self._run(
            x, lambda mx, a: mx.distributed.recv_like(a, source, group=self._ring), timeout_s
        )

    def barrier(self, *, timeout_s: float) -> None:
        """See :meth:`compute.collectives.Group.barrier`."""
        self.all_reduce_sum(np.ones(1, dtype=np.float32), timeout_s=timeout_s)

    def close(self) -> None:
        """See :meth:`compute.collectives.Group.close`. Sockets stay until the process ends."""
        self._lost = self._lost or PeerLost(self.rank, "this rank has left the group")
        self._thread.close()

    def _run(
        self,
        x: Tensor,
        operation: Callable[[Any, Any], Any],
        timeout_s: float,
        *,
        in_place: bool = True,
    ) -> Tensor:
        if self._lost is not None:
            raise PeerLost(self._lost.rank, self._lost.why)
        import mlx.core as mx

        if isinstance(x, mx.array):
            mx.eval(x)  # here: a thread can evaluate only what itself has begun

        def evaluate() -> Any:
            with mx.stream(mx.cpu):
                result = operation(mx, mx.array(x))
                mx.eval(result)
                return np.array(result) if isinstance(x, np.ndarray) else result

        try:
            result = self._thread.run(evaluate, timeout_s)
        except TimeoutError as exc:
            raise self._give_up(f"silent for {timeout_s:g} s") from exc
        except RuntimeError as exc:  # what the ring raises
            raise self._give_up(str(exc)) from exc
        if in_place and isinstance(x, np.ndarray):
            x[...] = result
            return x
        return result

    def _give_up(self, why: str) -> PeerLost:
        self._lost = PeerLost(-1, why)
        return PeerLost(-1, why)

    def _check_neighbour(self, rank: int) -> None:
        around = {(self.rank + step) % self.world_size for step in (1, -1)} - {self.rank}
        if rank not in around:
            raise ValueError(f"rank {self.rank} is not beside rank {rank} in the ring")


def _init(rendezvous: Rendezvous, timeout_s: float) -> Any:
    """Mlx reads its place from the environment and a file.

    It waits for its neighbours for ever and keeps the interpreter's lock. All ranks were here a
    moment ago; should one be gone, nothing but the end of this process ends the wait.
    """
    import mlx.core as mx

    faulthandler.dump_traceback_later(timeout_s, exit=True)
    with tempfile.TemporaryDirectory(prefix="phalanx-") as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"{host}:{port}"] for host, port in rendezvous.ring]))
        os.environ["MLX_RANK"] = str(rendezvous.rank)
        os.environ["MLX_HOSTFILE"] = str(hosts)
        try:
            return mx.distributed.init(strict=True, backend="ring")
        except RuntimeError as exc:
            raise PeerLost(-1, f"the ring did not close: {exc}") from exc
        finally:
            faulthandler.cancel_dump_traceback_later()
