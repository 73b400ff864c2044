"""Which part of a model one rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Half-open ranges of what a rank keeps.

    Attributes:
        layers: decoder layers; the first rank of a pipeline has the embedding, the last the
            output layer.
        kv_heads: key/value heads, each with the queries that it serves.
        ffn: inner features of the MLP.
    """

    layers: range
    kv_heads: range
    ffn: range

    @classmethod
    def whole(cls, spec: ModelSpec) -> Shard:
        """All of a model."""
        return cls(
            layers=range(spec.num_layers),
            kv_heads=range(spec.num_kv_heads),
            ffn=range(spec.ffn_size),
        )

    def is_first(self) -> bool:
        """Whether tokens enter here."""
        return self.layers.start == 0

    def is_last(self, spec: ModelSpec) -> bool:
        """Whether logits leave here."""
        return self.layers.stop == spec.num_layers

    def queries(self, spec: ModelSpec) -> slice:
        """Rows of the q projection, columns of the o projection."""
        size = spec.num_heads // spec.num_kv_heads * spec.head_dim
        return slice(self.kv_heads.start * size, self.kv_heads.stop * size)

    def keys(self, spec: ModelSpec) -> slice:
        """Rows of the k and v projections."""
        size = spec.head_dim
        return slice(self.kv_heads.start * size, self.kv_heads.stop * size)

    def inner(self) -> slice:
        """Rows of the gate and up projections, columns of the down projection."""
        return slice(self.ffn.start, self.ffn.stop)
