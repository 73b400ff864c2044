"""A checkpoint of random weights, made as they are read: for checks that need no file."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from models.errors import UnsupportedModel
from models.layout import expected_tensors
from models.quant import Bytes
from models.spec import ModelSpec
from models.spec_hf import from_hf_config
from models.tokenizer import Tokenizer
from models.weights import Weight

_BASE: Final[dict[str, Any]] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
_LATENT: Final[dict[str, Any]] = _BASE | {
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "llama": _BASE,
    "qwen2": _BASE | {"tie_word_embeddings": True},
    "qwen3": _BASE,
    "gemma3_text": _BASE | {"num_key_value_heads": 1, "sliding_window": 24},
    "mixtral": _BASE | {"num_local_experts": 8},
    "qwen3_moe": _BASE | {"num_experts": 16, "moe_intermediate_size": 96, "norm_topk_prob": True},
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT,
}


def small_spec(model_type: str) -> ModelSpec:
    """A small model of ``FAMILIES``."""
    return from_hf_config({**FAMILIES[model_type], "model_type": model_type}, Path("config.json"))


@dataclass
class RandomCheckpoint:
    """A :class:`models.checkpoint.Checkpoint` whose weights follow from a seed and their names.

    Values have the size that keeps a residual's: every process that makes it has the same.
    """

    spec: ModelSpec
    seed: int = 0
    path: Path = Path("random")
    chat_template: str | None = None
    size_bytes: int = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.size_bytes = 4 * sum(
            math.prod(shape) for shape in expected_tensors(self.spec).values()
        )
        self.fingerprint = f"random-{self.seed}"

    def names(self) -> list[str]:
        """See :meth:`models.checkpoint.Checkpoint.names`."""
        return list(expected_tensors(self.spec))

    def tensor(self, name: str) -> Weight:
        """See :meth:`models.checkpoint.Checkpoint.tensor`; drawn anew on every call."""
        shape = expected_tensors(self.spec)[name]
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        values = rng.standard_normal((shape[0], shape[1] if len(shape) == 2 else 1))
        if len(shape) == 2:
            values *= shape[1] ** -0.5
        else:
            values = 0.1 * values + (1 - self.spec.norm_offset if "norm" in name else 0)
        return Weight(name, shape, "F32", values.astype(np.float32).view(np.uint8))

    def tokenizer(self) -> Tokenizer:
        """Always refused. Raises UnsupportedModel."""
        raise UnsupportedModel(self.path, "random weights have no words")

    def release(self) -> None:
        """No file is held."""

    def mapped_files(self) -> dict[Path, Bytes]:
        """There are none."""
        return {}

    def read_when_opened(self) -> list[Bytes]:
        """Nothing."""
        return []
