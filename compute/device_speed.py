"""How fast a device is with the engine that would run there: some steps of a made-up model.

Layers have the size of a real model's, so that what a layer costs beside its weights counts as it
does there; there are few of them, so that all takes about a second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from compute.engine import Row, StageEngine
from compute.stage import load_stage
from models.errors import UnsupportedModel
from models.footprint import MAX_POSITIONS
from models.layout import expected_tensors
from models.mesh import whole
from models.quant import KINDS, Bytes
from models.spec import ModelSpec
from models.spec_hf import from_hf_config
from models.tokenizer import Tokenizer
from models.weights import Weight

ENOUGH_S: Final = 0.4  # of each kind of step, but two at least
MOST_STEPS: Final = 200
_SIZES: Final[dict[str, dict[str, int]]] = {  # beyond what caches hold; of a 7B on a GPU
    "cpu": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 1},
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2},
    "mlx": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2},
}
_HEAD_DIM: Final = 128
_STORED: Final = {"cuda": "BF16"}  # else Q8_0


def measure(device: str, *, threads: int) -> tuple[float, float]:
    """Weights a second with one position, and floating-point operations a second with many.

    Args:
        device: ``cpu:0``, ``cuda:N`` or ``mlx:0``.
        threads: on a CPU.

    Raises:
        ValueError: an unknown device.
        compute.errors.OutOfMemory: no room for about a gigabyte on a GPU, or 150 MB.
    """
    kind = device.partition(":")[0]
    if kind not in _SIZES:
        raise ValueError(f"unknown device {device!r}: give cpu:0, cuda:N or mlx:0")
    checkpoint = _MadeUp(_spec(kind), _STORED.get(kind, "Q8_0"))
    stage = load_stage(
        checkpoint,
        whole(checkpoint.spec),
        context_tokens=2 * MAX_POSITIONS,
        num_slots=1,
        threads=threads,
        device=device,
        on_progress=lambda done, total: None,
    )
    engine = StageEngine(stage)
    try:
        weights = float(checkpoint.num_matrix_weights)
        many = tuple(i % checkpoint.spec.vocab_size for i in range(MAX_POSITIONS))
        engine.forward([Row(0, many, 0)])  # what is made on first use is made now
        many_s = _least_s(engine, many, 0)
        one_s = _least_s(engine, (1,), len(many))
    finally:
        engine.close()
    return weights / one_s, 2 * weights * len(many) / many_s


def _least_s(engine: StageEngine, ids: tuple[int, ...], start: int) -> float:
    """Seconds of the quickest of some equal steps: others on this machine only make it slower."""
    begun_s, best_s = time.perf_counter(), float("inf")
    for number in range(MOST_STEPS):
        step_s = time.perf_counter()
        engine.forward([Row(0, ids, start)])
        now_s = time.perf_counter()
        best_s = min(best_s, now_s - step_s)
        if number and now_s - begun_s > ENOUGH_S:
            break
    return best_s


def _spec(kind: str) -> ModelSpec:
    size = _SIZES[kind]
    heads = size["hidden_size"] // _HEAD_DIM
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 1024,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": 4 * MAX_POSITIONS,
        **size,
    }
    return from_hf_config(config, Path("config.json"))


@dataclass
class _MadeUp:
    """A :class:`models.checkpoint.Checkpoint` of weights that mean nothing and are soon made."""

    spec: ModelSpec
    kind: str
    path: Path = Path("made-up")
    chat_template: str | None = None
    size_bytes: int = 0
    fingerprint: str = "made-up"
    _kept: dict[tuple[int, ...], Bytes] = field(default_factory=dict)

    @property
    def num_matrix_weights(self) -> int:
        """That a token is multiplied with: all but its own row of the embedding."""
        shapes = expected_tensors(self.spec).items()
        return sum(
            int(np.prod(shape)) for name, shape in shapes if len(shape) > 1 and "embed" not in name
        )

    def names(self) -> list[str]:
        """See :meth:`models.checkpoint.Checkpoint.names`."""
        return list(expected_tensors(self.spec))

    def tensor(self, name: str) -> Weight:
        """See :meth:`models.checkpoint.Checkpoint.tensor`."""
        shape = expected_tensors(self.spec)[name]
        if len(shape) == 1:
            return Weight(name, shape, "F32", np.ones((shape[0], 1), np.float32).view(np.uint8))
        if shape not in self._kept:
            self._kept[shape] = self._matrix(*shape)
        return Weight(name, shape, self.kind, self._kept[shape])

    def tokenizer(self) -> Tokenizer:
        """Always refused. Raises UnsupportedModel."""
        raise UnsupportedModel(self.path, "made-up weights have no words")

    def release(self) -> None:
        """No file is held."""

    def mapped_files(self) -> dict[Path, Bytes]:
        """There are none."""
        return {}

    def read_when_opened(self) -> list[Bytes]:
        """Nothing."""
        return []

    def _matrix(self, rows: int, columns: int) -> Bytes:
        """Small numbers of either sign: neither overflows nor denormals may slow the steps."""
        dice = np.random.default_rng(1)
        if self.kind == "BF16":
            signs = dice.integers(0, 2, (rows, columns), dtype=np.uint16) << 15
            return (signs | 0x3C00).view(np.uint8)
        blocks = columns // KINDS[self.kind].block_size
        made = dice.integers(0, 256, (rows, blocks, 34), dtype=np.uint8)
        made[:, :, :2] = np.array([2e-4], np.float16).view(np.uint8)
        return made.reshape(rows, blocks * 34)
