"""Checkpoints of random weights made in memory, of any small spec and storage format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.layout import expected_tensors
from models.quant import KINDS
from models.spec import ModelSpec
from models.tokenizer import Tokenizer
from models.weights import Weight
from tests.models.tiny import random_blocks


@dataclass
class MadeCheckpoint:
    """A :class:`models.checkpoint.Checkpoint` without a file."""

    spec: ModelSpec
    weights: dict[str, Weight]
    path: Path = Path("made")
    chat_template: str | None = None
    fingerprint: str = "made"

    @property
    def size_bytes(self) -> int:
        return sum(weight.size_bytes for weight in self.weights.values())

    def names(self) -> list[str]:
        return list(self.weights)

    def tensor(self, name: str) -> Weight:
        return self.weights[name]

    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError("there are no words")

    def release(self) -> None:
        pass


def made(spec: ModelSpec, kinds: tuple[str, ...] = ("F32",), seed: int = 0) -> MadeCheckpoint:
    """Random weights: matrices in ``kinds`` by turns where their columns fill blocks, else F32."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Weight] = {}
    for number, (name, shape) in enumerate(expected_tensors(spec).items()):
        kind = kinds[number % len(kinds)]
        if len(shape) == 2 and kind != "F32" and shape[1] % KINDS[kind].block_size == 0:
            weights[name] = Weight(name, shape, kind, random_blocks(kind, *shape, number))
            continue
        if len(shape) == 1:
            centre = 1 - spec.norm_offset if "norm" in name else 0.0
            values = centre + 0.3 * rng.standard_normal((shape[0], 1))
        else:
            values = rng.standard_normal(shape) * 2 / shape[1] ** 0.5
        data = values.astype(np.float32).view(np.uint8)
        weights[name] = Weight(name, shape, "F32", data)
    return MadeCheckpoint(spec, weights)
