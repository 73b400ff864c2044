"""Keys and values of every slot, or latent vectors in their place."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from compute.torch.step import Step
from models.sharding import RankShard
from models.spec import ModelSpec


class Cache:
    """What a rank remembers of each position; memory is touched as positions are filled.

    Attributes:
        keys, values: (layers, slots, kv heads, context, head_dim); for latent attention there is
            one head, whose keys are the normed latent vector and behind it the rotated part, and
            whose values are the first features of the keys.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: RankShard,
        *,
        context_tokens: int,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        latent = spec.latent
        heads = len(shard.kv_heads) if latent is None else 1
        size = spec.head_dim if latent is None else latent.kv_rank + latent.rope_dim
        shape = (len(shard.layers), num_slots, heads, context_tokens, size)
        self.keys = _zeros(shape, device, dtype)
        if latent is None:
            self.values = _zeros(shape, device, dtype)
        else:
            self.values = self.keys[..., : latent.kv_rank]
        self.memory_bytes = self.keys.nbytes + (0 if latent else self.values.nbytes)

    def put(self, layer: int, step: Step, keys: Tensor, values: Tensor | None = None) -> None:
        """Remember the new positions of a layer (counted within the rank): (N, heads, size)."""
        at = (step.slots_N, slice(None), step.positions_N)
        self.keys[layer][at] = keys.to(self.keys.dtype)
        if values is not None:
            self.values[layer][at] = values.to(self.values.dtype)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # numpy asks the system for zeroed memory, which costs nothing until it is written
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
