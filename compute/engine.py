"""What an engine must do, and which engine serves a device.

An engine owns the weights of one shard and the key/value memory of its slots. It turns token ids
into logits and knows nothing of requests, sampling or text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

COMPILE_S = 900.0  # for another process to compile the kernels that this one waits for

if TYPE_CHECKING:
    from models.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one sequence to run in one step.

    Attributes:
        slot: which key/value slot the sequence lives in, ``0 <= slot < num_slots``.
        ids: the tokens to run, at least one; positions before ``start`` are in the slot already.
        start: position of ``ids[0]``.
        want_logits: whether the logits after the last of ``ids`` are returned.
    """

    slot: int
    ids: tuple[int, ...]
    start: int
    want_logits: bool = True


class Engine(Protocol):
    """One loaded shard. Calls come from one thread."""

    @property
    def spec(self) -> ModelSpec:
        """The architecture that is loaded."""
        ...

    @property
    def context_tokens(self) -> int:
        """Positions a slot holds."""
        ...

    @property
    def num_slots(self) -> int:
        """Sequences held at once."""
        ...

    @property
    def device(self) -> str:
        """``"cpu:0"`` or ``"cuda:N"``."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Weights, key/value memory and workspace together."""
        ...

    def forward(self, rows: Sequence[Row]) -> FloatArray:
        """Run one step and remember the keys and values of every new position.

        Args:
            rows: at most one per slot.

        Returns:
            float32 ``(number of rows with want_logits, vocab)``, in the order of ``rows``; the
            caller may keep or change it.

        Raises:
            ValueError: a row without ids, a slot or position or id out of range, a slot twice.
        """
        ...

    def close(self) -> None:
        """Free threads and memory; the engine cannot be used afterwards."""
        ...


def check_rows(
    rows: Sequence[Row], *, num_slots: int, context_tokens: int, vocab_size: int
) -> None:
    """Refuse rows that an engine must not run.

    Raises:
        ValueError: names the row's slot and the limit it breaks.
    """
    seen: set[int] = set()
    for row in rows:
        if not 0 <= row.slot < num_slots:
            raise ValueError(f"slot {row.slot} is outside 0..{num_slots - 1}")
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


def load_engine(
    path: Path,
    *,
    context_tokens: int,
    num_slots: int,
    threads: int,
    device: str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Engine:
    """Load a model file or folder for one device.

    Args:
        path: a GGUF file, or a folder with ``config.json`` and safetensors.
        context_tokens: positions of each slot; at most the model's own context.
        num_slots: sequences held at once.
        threads: CPU threads of the engine; not used on CUDA.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None takes CUDA where there is a device.
        on_progress: told ``(done, total)`` bytes of weights while loading.

    Raises:
        models.errors.CorruptModel: the file is damaged.
        models.errors.UnsupportedModel: an architecture or weight type no engine here runs.
        models.errors.NoSuchModel: nothing there to open.
        compute.errors.OutOfMemory: the system has no room for the cache.
        ValueError: a limit is not positive, the context is beyond the model's, or the device is
            unknown.
    """
    if context_tokens < 1 or num_slots < 1 or threads < 1:
        raise ValueError(
            f"context_tokens={context_tokens}, num_slots={num_slots} and threads={threads} "
            "must all be at least 1"
        )
    from models.checkpoint import open_checkpoint

    device = device or _best_device()
    checkpoint = open_checkpoint(path)
    limit = checkpoint.spec.context_length
    if context_tokens > limit:
        raise ValueError(f"context_tokens={context_tokens} is beyond the model's {limit}")
    kind, _, index = device.partition(":")
    if kind == "cpu" and index in ("", "0"):
        from compute.cpu.engine import CpuEngine

        return CpuEngine.load(
            checkpoint,
            context_tokens=context_tokens,
            num_slots=num_slots,
            threads=threads,
            on_progress=on_progress,
        )
    if kind == "cuda" and (not index or index.isdecimal()):
        from compute.torch.engine import TorchEngine

        return TorchEngine.load(
            checkpoint,
            context_tokens=context_tokens,
            num_slots=num_slots,
            device=f"cuda:{index or 0}",
            on_progress=on_progress,
        )
    raise ValueError(f"unknown device {device!r}: give cpu, cuda or cuda:N")


def warm_up() -> None:
    """Import, and on a CPU compile, what ``load_engine`` will need, so that it is short later.

    Of several processes that start together one compiles, the others wait and take its code.
    """
    if _best_device() != "cpu":
        import compute.torch.engine  # noqa: F401

        return
    import filelock
    import numba

    from compute.cpu.warm import warm_up as compile_kernels

    folder = Path(numba.config.CACHE_DIR)  # type: ignore[attr-defined]  # set at run time
    with filelock.FileLock(folder / "compiling.lock", timeout=COMPILE_S):
        compile_kernels()


def _best_device() -> str:
    """CUDA when a driver and a device are there, else the CPU.

    The driver library is looked for first, because importing torch costs seconds.
    """
    import ctypes

    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        import torch

        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return "cpu"
