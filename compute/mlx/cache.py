"""Keys and values of every slot and layer: arrays that grow with their sequence.

Shape letters: K key/value heads, L new positions, S positions seen, E features of a key.
"""

from __future__ import annotations

import math

import mlx.core as mx

PAGE_TOKENS = 256  # an array grows by so many positions, so that few steps copy


class Cache:
    """What one rank remembers of each position.

    Attributes:
        widths: features of each array of a layer: a key's and a value's, or a latent vector's.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        widths: tuple[int, ...],
        context_tokens: int,
        num_slots: int,
        dtype: mx.Dtype,
    ) -> None:
        self.widths = widths
        self._num_heads, self._context_tokens, self._dtype = num_heads, context_tokens, dtype
        self._arrays: list[list[list[mx.array]]] = [
            [[] for _ in range(num_slots)] for _ in range(num_layers)
        ]
        elements = num_layers * num_slots * num_heads * context_tokens * sum(widths)
        self.full_bytes = elements * dtype.size

    def append(
        self, layer: int, slot: int, start: int, new: tuple[mx.array, ...], first: int
    ) -> list[mx.array]:
        """Remember new positions; everything from position ``first`` to the last of them.

        Args:
            layer: counted within the rank.
            slot, start: whose, and where the new ones begin.
            new: (1, K, L, E) for each of ``widths``.
            first: start of what is wanted back.

        Returns:
            For each of ``widths`` (1, K, S, E).
        """
        stop = start + new[0].shape[2]
        held = self._arrays[layer][slot]
        if not held or held[0].shape[2] < stop:
            self._grow(held, stop)
        for array, values in zip(held, new, strict=True):
            array[:, :, start:stop] = values.astype(self._dtype)
        return [array[:, :, first:stop] for array in held]

    def arrays(self, slot: int) -> list[mx.array]:
        """All arrays of a slot, to evaluate them with a step."""
        return [array for layer in self._arrays for array in layer[slot]]

    def _grow(self, held: list[mx.array], tokens: int) -> None:
        room = min(math.ceil(tokens / PAGE_TOKENS) * PAGE_TOKENS, self._context_tokens)
        for index, width in enumerate(self.widths):
            shape = (1, self._num_heads, room, width)
            if index == len(held):
                held.append(mx.zeros(shape, self._dtype))
                continue
            missing = room - held[index].shape[2]
            held[index] = mx.pad(held[index], [(0, 0), (0, 0), (0, missing), (0, 0)])
