"""Checkpoints of random weights made in memory, of any small spec and storage format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from models.layout import expected_tensors
from models.quant import KINDS, Bytes
from models.spec import ModelSpec
from models.tokenizer import Tokenizer
from models.weights import Weight
from tests.models.tiny import random_blocks


@dataclass
class MadeCheckpoint:
    """A :class:`models.checkpoint.Checkpoint` without a file."""

    spec: ModelSpec
    weights: dict[str, Weight]
    size_bytes: int
    path: Path = Path("made")
    chat_template: str | None = None
    fingerprint: str = "made"

    def names(self) -> list[str]:
        return list(self.weights)

    def tensor(self, name: str) -> Weight:
        return self.weights[name]

    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError("there are no words")

    def release(self) -> None:
        pass

    def mapped_files(self) -> dict[Path, Bytes]:
        return {}

    def read_when_opened(self) -> list[Bytes]:
        return []


def made(spec: ModelSpec, kinds: tuple[str, ...] = ("F32",), seed: int = 0) -> MadeCheckpoint:
    """Random weights: matrices in ``kinds`` by turns where their columns fill blocks, else F32."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Weight] = {}
    for number, (name, shape) in enumerate(expected_tensors(spec).items()):
        kind = kinds[number % len(kinds)]
        if len(shape) == 1:
            centre = 1 - spec.norm_offset if "norm" in name else 0.0
            values = centre + 0.3 * rng.standard_normal((shape[0], 1))
        else:
            values = rng.standard_normal(shape) * 2 / shape[1] ** 0.5
        data = values.astype(np.float32)
        if len(shape) == 1 or kind == "F32" or shape[1] % KINDS[kind].block_size:
            weights[name] = Weight(name, shape, "F32", data.view(np.uint8))
        else:
            weights[name] = Weight(name, shape, kind, _blocks(kind, data, number))
    return MadeCheckpoint(spec, weights, sum(weight.size_bytes for weight in weights.values()))


def _blocks(kind: str, values: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.uint8]:
    """``values`` in a format; where gguf cannot write it, random blocks."""
    try:
        packed = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        return random_blocks(kind, values.shape[0], values.shape[1], seed)
    return np.asarray(packed).view(np.uint8).reshape(values.shape[0], -1)
