"""What the worker drives: steps of rows into logits, of one rank or of a whole mesh.

An engine knows nothing of requests, sampling or text. In a pipeline it takes several steps at
once, so that every stage has one to work on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from compute.links import Links, run
from compute.stage import (
    FloatArray,
    Progress,
    Row,
    Stage,
    best_device,
    check_rows,
    load_stage,
    parts,
)

__all__ = ["Engine", "Row", "StageEngine", "check_rows", "load_engine", "warm_up"]

COMPILE_S = 900.0  # for another process to compile the kernels that this one waits for

if TYPE_CHECKING:
    from models.spec import ModelSpec


class Engine(Protocol):
    """A loaded model. Calls come from one thread."""

    @property
    def spec(self) -> ModelSpec:
        """The architecture that is loaded."""
        ...

    @property
    def context_tokens(self) -> int:
        """Positions that a sequence can have."""
        ...

    @property
    def num_sequences(self) -> int:
        """Sequences that can run at once."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages of ``PAGE_TOKENS`` positions that they share."""
        ...

    @property
    def depth(self) -> int:
        """Steps that may be under way at once: the stages of its pipeline."""
        ...

    def start(self, rows: Sequence[Row]) -> None:
        """Begin a step; it remembers the keys and values of every new position.

        Steps run in the order in which they began, so a row may follow upon one of a step that is
        still under way.

        Args:
            rows: at most one per slot.

        Raises:
            ValueError: a row without ids, a slot or position or id out of range, a slot twice.
            PeerLost: a rank is gone; so is this engine.
        """
        ...

    def finish(self) -> FloatArray:
        """Wait for the oldest step under way.

        Returns:
            float32 ``(number of rows with want_logits, vocab)``, in the order of its rows; the
            caller may keep or change it.

        Raises:
            PeerLost: a rank is gone; so is this engine.
        """
        ...

    def close(self) -> None:
        """Free threads and memory; the engine cannot be used afterwards."""
        ...


class StageEngine:
    """An :class:`Engine` on the head of a mesh: its own stage, and orders to all other ranks."""

    def __init__(self, stage: Stage, links: Links | None = None) -> None:
        self._stage, self._links = stage, links or Links()
        self._under_way: deque[list[list[Row]]] = deque()
        self.spec = stage.spec
        self.context_tokens, self.num_slots = stage.context_tokens, stage.num_slots
        self.num_sequences, self.num_pages = stage.num_sequences, stage.num_pages
        self.depth = stage.shard.pipeline.world_size

    @property
    def device(self) -> str:
        """Where the head's stage is."""
        return self._stage.device

    @property
    def memory_bytes(self) -> int:
        """Of the head's stage: weights, key/value memory when full, workspace."""
        stage = self._stage
        return stage.weights_bytes + stage.kv_bytes + stage.workspace_bytes

    def start(self, rows: Sequence[Row]) -> None:
        """See :meth:`Engine.start`."""
        check_rows(
            rows,
            num_sequences=self.num_sequences,
            context_tokens=self.context_tokens,
            vocab_size=self.spec.vocab_size,
        )
        cut = parts(rows)
        self._under_way.append(cut)
        if self._links.sender is not None:
            for part in cut:
                self._links.sender.send(part)

    def finish(self) -> FloatArray:
        """See :meth:`Engine.finish`."""
        logits = [run(self._stage, self._links, part) for part in self._under_way.popleft()]
        if len(logits) == 1:
            return logits[0]
        return np.concatenate(logits or [np.empty((0, self.spec.vocab_size), dtype=np.float32)])

    def forward(self, rows: Sequence[Row]) -> FloatArray:
        """One step from beginning to end; none may be under way."""
        self.start(rows)
        return self.finish()

    def close(self) -> None:
        """See :meth:`Engine.close`. The other ranks see the end of their orders."""
        self._links.close()
        self._stage.close()


def load_engine(
    path: Path,
    *,
    context_tokens: int,
    num_slots: int,
    threads: int,
    device: str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> StageEngine:
    """Load a whole model on one device.

    Args:
        path: a GGUF file, or a folder with ``config.json`` and safetensors.
        context_tokens: positions of a sequence; at most the model's own context.
        num_slots: sequences of that length that there is memory for.
        threads: CPU threads of the engine; not used on CUDA.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mlx"``; None takes the best there is.
        on_progress: told ``(done, total)`` bytes of weights while loading.

    Raises:
        models.errors.CorruptModel: the file is damaged.
        models.errors.UnsupportedModel: an architecture or weight type no engine here runs.
        models.errors.NoSuchModel: nothing there to open.
        compute.errors.OutOfMemory: the system has no room for the cache.
        ValueError: a limit is not positive, the context is beyond the model's, or the device is
            unknown.
    """
    from models.checkpoint import open_checkpoint
    from models.mesh import whole

    checkpoint = open_checkpoint(path)
    check_limits(checkpoint.spec, context_tokens, num_slots, threads)
    stage = load_stage(
        checkpoint,
        whole(checkpoint.spec),
        context_tokens=context_tokens,
        num_slots=num_slots,
        threads=threads,
        device=device or best_device(),
        on_progress=on_progress,
    )
    engine = StageEngine(stage)
    engine.forward([Row(slot=0, ids=(0,), start=0)])  # compiles, if nobody has yet
    return engine


def check_limits(spec: ModelSpec, context_tokens: int, num_slots: int, threads: int) -> None:
    """Raise ValueError for sizes that no engine can have, with the numbers."""
    if context_tokens < 1 or num_slots < 1 or threads < 1:
        raise ValueError(
            f"context_tokens={context_tokens}, num_slots={num_slots} and threads={threads} "
            "must all be at least 1"
        )
    if context_tokens > spec.context_length:
        raise ValueError(
            f"context_tokens={context_tokens} is beyond the model's {spec.context_length}"
        )


def warm_up() -> None:
    """Import, and on a CPU compile, what loading will need, so that it is short later.

    Of several processes that start together one compiles, the others wait and take its code.
    """
    device = best_device()
    if device == "mlx":
        import compute.mlx.stage

        return
    if device != "cpu":
        import compute.torch.engine  # noqa: F401

        return
    import filelock
    import numba

    from compute.cpu.warm import warm_up as compile_kernels

    folder = Path(numba.config.CACHE_DIR)  # type: ignore[attr-defined]  # set at run time
    with filelock.FileLock(folder / "compiling.lock", timeout=COMPILE_S):
        compile_kernels()
