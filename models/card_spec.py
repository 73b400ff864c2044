"""What a card lets one assume of a model that is not downloaded: its sizes and its storage format.

Good enough for a memory estimate and for what a mesh may be; not for running anything.
"""

from __future__ import annotations

import math
from typing import get_args

from models.card import Card, PackageSource
from models.layout import expected_tensors
from models.quant import KINDS
from models.spec import Family, ModelSpec, RopeSpec

_LIKELY = ("Q4_0", "Q4_1", "Q5_1", "Q6_K", "Q8_0", "BF16", "F32")


def spec_of_card(card: Card) -> ModelSpec:
    """A spec with the card's sizes; whether the output layer is tied follows from its parameters.

    Raises:
        ValueError: no family has such sizes.
    """
    if card.family not in get_args(Family):
        raise ValueError(f"{card.id}: unknown family {card.family!r}")
    return min(
        (_spec(card, tied=tied) for tied in (True, False)),
        key=lambda spec: abs(_num_weights(spec) - card.parameters),
    )


def kind_of_card(card: Card) -> str:
    """The storage format that the name of a GGUF file tells, as most of its weights have it.

    Else the one whose bytes of a weight are nearest to those of the card's files.
    """
    for source in card.sources[:1]:
        if isinstance(source, PackageSource):
            told = [kind for kind in KINDS if kind.lower() in source.file.lower()]
            if told:
                return max(told, key=len)
    bytes_per_weight = card.size_bytes / card.parameters
    return min(_LIKELY, key=lambda kind: abs(_bytes_per_weight(kind) - bytes_per_weight))


def _spec(card: Card, *, tied: bool) -> ModelSpec:
    shape = card.shape
    return ModelSpec(
        family=card.family,  # type: ignore[arg-type]  # checked by the caller
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        ffn_size=shape.ffn_size,
        vocab_size=shape.vocab_size,
        context_length=card.context_length,
        norm_eps=1e-6,
        rope=RopeSpec(theta=10_000.0, dim=shape.head_dim),
        windows=(None,) * shape.num_layers,
        attention_scale=1 / math.sqrt(shape.head_dim),
        tied_embeddings=tied,
    )


def _num_weights(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(spec).values())


def _bytes_per_weight(kind: str) -> float:
    return KINDS[kind].block_bytes / KINDS[kind].block_size
