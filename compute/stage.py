"""What one rank computes of a step: its layers, and its part of each of them.

A stage is one cell of the mesh. Between the stages of a pipeline goes the residual; within a
stage the tensor ranks sum their partial results, as often as the architecture asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from compute.collectives import Group, Tensor
from compute.errors import numbered_as
from models.needed import check_here

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.sharding import RankShard
    from models.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

MAX_POSITIONS = 256  # new positions in one run of a stage, over all its rows


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one sequence to run in one step.

    Attributes:
        slot: number of the sequence among those that run, ``0 <= slot < num_sequences``.
        ids: the tokens to run, at least one; positions before ``start`` are in memory already, or
            are written by rows before this one.
        start: position of ``ids[0]``.
        want_logits: whether the logits after the last of ``ids`` are returned.
        pages: where in memory the sequence's positions are from now on, page by page, beginning
            with the ``first_page``-th of the sequence; what is not named stays as it was.
    """

    slot: int
    ids: tuple[int, ...]
    start: int
    want_logits: bool = True
    pages: tuple[int, ...] = ()
    first_page: int = 0


@dataclass(frozen=True, slots=True)
class Peers:
    """The tensor ranks of one stage, as a stage uses them. Where there is one rank: None instead.

    Attributes:
        group: carries arrays of the stage's own kind (numpy, torch or mlx).
        vocab: rows of the output layer that each rank has, in rank order.
        timeout_s: before a silent peer counts as lost.
        ranks: what the members of the group are called in the mesh; empty: as in the group.
    """

    group: Group
    vocab: tuple[range, ...]
    timeout_s: float
    ranks: tuple[int, ...] = ()

    def sum(self, x: Tensor) -> Tensor:
        """Everybody's ``x`` added up, in place where arrays can change. Raises PeerLost."""
        with numbered_as(self.ranks):
            return self.group.all_reduce_sum(x, timeout_s=self.timeout_s)

    def gather(self, part: Tensor) -> list[Tensor]:
        """Logits of all ranks, (outputs, their vocab) each, in rank order. Raises PeerLost."""
        shapes = [(int(part.shape[0]), len(rows)) for rows in self.vocab]
        with numbered_as(self.ranks):
            return self.group.all_gather(part, shapes=shapes, timeout_s=self.timeout_s)


class Stage(Protocol):
    """One rank's loaded weights and key/value memory. Calls come from one thread."""

    @property
    def spec(self) -> ModelSpec:
        """The architecture that is loaded."""
        ...

    @property
    def shard(self) -> RankShard:
        """What of it this rank holds."""
        ...

    @property
    def context_tokens(self) -> int:
        """Positions that a sequence can have."""
        ...

    @property
    def num_slots(self) -> int:
        """Sequences of that length that there is memory for."""
        ...

    @property
    def num_sequences(self) -> int:
        """Sequences that can run at once where they are shorter."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages of ``PAGE_TOKENS`` positions in that memory."""
        ...

    @property
    def device(self) -> str:
        """``"cpu:0"``, ``"cuda:N"`` or ``"mlx:0"``."""
        ...

    @property
    def kernels(self) -> str:
        """What multiplies: ``"compiled"``, ``"torch"`` or ``"mlx"``."""
        ...

    @property
    def weights_bytes(self) -> int:
        """Weights as they lie in memory."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Key/value memory when every page is full."""
        ...

    @property
    def workspace_bytes(self) -> int:
        """Buffers and tables beside them."""
        ...

    def run(
        self, rows: Sequence[Row], incoming: FloatArray | None, peers: Peers | None
    ) -> FloatArray:
        """Run this rank's layers and remember the keys and values of every new position.

        The rows are valid (``check_rows``) and have at most ``MAX_POSITIONS`` new positions.
        Every tensor rank of the stage makes the same call. In each layer the keys and values of
        all new positions are in memory before any is read: a row may hold a page that another
        row of the same call fills.

        Args:
            rows: at most one per slot.
            incoming: float32 (positions, hidden), the residual that the stage before handed on,
                the same on all tensor ranks; None on the first stage, which embeds the ids.
            peers: the other tensor ranks; None where the stage is one rank.

        Returns:
            On the last stage float32 logits (rows that want them, vocab), whole on every rank;
            else the residual to hand on, float32 (positions, hidden). The caller may keep it.

        Raises:
            PeerLost: a tensor rank ended or is silent; the stage cannot be used any more.
        """
        ...

    def close(self) -> None:
        """Free threads and memory."""
        ...


def num_positions(rows: Sequence[Row]) -> int:
    """New positions of all rows together."""
    return sum(len(row.ids) for row in rows)


def check_rows(
    rows: Sequence[Row], *, num_sequences: int, context_tokens: int, vocab_size: int
) -> None:
    """Refuse rows that a stage must not run.

    Raises:
        ValueError: names the row's slot and the limit it breaks.
    """
    seen: set[int] = set()
    for row in rows:
        if not 0 <= row.slot < num_sequences:
            raise ValueError(f"slot {row.slot} is outside 0..{num_sequences - 1}")
        if row.slot in seen:
            raise ValueError(f"slot {row.slot} appears twice in one step")
        seen.add(row.slot)
        if not row.ids:
            raise ValueError(f"slot {row.slot}: a row needs at least one token id")
        if row.start < 0 or row.start + len(row.ids) > context_tokens:
            raise ValueError(
                f"slot {row.slot}: positions {row.start}..{row.start + len(row.ids) - 1} "
                f"are outside the context of {context_tokens} tokens"
            )
        if min(row.ids) < 0 or max(row.ids) >= vocab_size:
            raise ValueError(
                f"slot {row.slot}: token ids must be 0..{vocab_size - 1}, "
                f"found {min(row.ids)}..{max(row.ids)}"
            )


def parts(rows: Sequence[Row], room: int = MAX_POSITIONS) -> list[list[Row]]:
    """Cut rows so that each part has at most ``room`` positions; only ends want logits."""
    out: list[list[Row]] = [[]]
    left = room
    for row in rows:
        at = 0
        while at < len(row.ids):
            if left == 0:
                out.append([])
                left = room
            ids = row.ids[at : at + left]
            ends = at + len(ids) == len(row.ids)
            told = (row.pages, row.first_page) if at == 0 else ()
            out[-1].append(Row(row.slot, ids, row.start + at, row.want_logits and ends, *told))
            left -= len(ids)
            at += len(ids)
    return [part for part in out if part]


def load_stage(
    checkpoint: Checkpoint,
    shard: RankShard,
    *,
    context_tokens: int,
    num_slots: int,
    threads: int,
    device: str,
    on_progress: Progress,
) -> Stage:
    """Load one rank's slice of a checkpoint.

    Args:
        shard: what to load, see ``models.mesh``.
        context_tokens, num_slots: of the key/value memory.
        threads: CPU threads.
        device: ``cpu``, ``cuda:N`` or ``mlx``.
        on_progress: told ``(done, total)`` bytes of the file's weights that belong to the slice.

    Raises:
        models.errors.CorruptModel: a tensor cannot be read.
        models.errors.PartsMissing: the model is here in parts, and not all of the slice.
        models.errors.UnsupportedModel: nothing here runs such an architecture on that device.
        compute.errors.OutOfMemory: no room.
        ValueError: an unknown device.
    """
    check_here(checkpoint, shard)
    kind, _, index = device.partition(":")
    if kind == "cpu" and index in ("", "0"):
        from compute.cpu.weights import is_supported

        if is_supported(checkpoint.spec):
            from compute.cpu.engine import CpuStage

            return CpuStage.load(
                checkpoint,
                shard,
                context_tokens=context_tokens,
                num_slots=num_slots,
                threads=threads,
                on_progress=on_progress,
            )
    if kind == "mlx" and index in ("", "0"):
        from compute.mlx.stage import MlxStage

        return MlxStage.load(
            checkpoint,
            shard,
            context_tokens=context_tokens,
            num_slots=num_slots,
            on_progress=on_progress,
        )
    if kind in ("cpu", "cuda") and (not index or index.isdecimal()):
        from compute.torch.engine import TorchStage

        return TorchStage.load(
            checkpoint,
            shard,
            context_tokens=context_tokens,
            num_slots=num_slots,
            threads=threads,
            device="cpu" if kind == "cpu" else f"cuda:{index or 0}",
            on_progress=on_progress,
        )
    raise ValueError(f"unknown device {device!r}: give cpu, cuda, cuda:N or mlx")


def best_device() -> str:
    """CUDA when a driver and a device are there, MLX on Apple silicon, else the CPU.

    The driver library is looked for first, because importing torch costs seconds.
    """
    import ctypes
    import importlib.util
    import platform
    import sys

    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mlx" if importlib.util.find_spec("mlx") is not None else "cpu"  # from macOS 14 on
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        import torch

        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return "cpu"
