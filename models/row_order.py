"""Row orders: where the rotated rows of a projection lie pairwise in the file, halves are read.

Whole rows move, so packed blocks stay intact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.spec import ModelSpec

Longs = npt.NDArray[np.int64]


def deinterleave(num_heads: int, head_dim: int) -> Longs:
    """File row of each row of a query or key matrix whose heads are stored pairwise.

    Within a head the file has (pair, half), the canonical order is (half, pair).

    Source: llama.cpp ``convert_hf_to_gguf.py``, ``LlamaModel.permute``.
    """
    rows = np.arange(num_heads * head_dim, dtype=np.int64)
    return rows.reshape(num_heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def heads_order(module: str, spec: ModelSpec) -> Longs | None:
    """Order of ``q_proj`` and ``k_proj`` (ordinary attention); None for other modules."""
    num_heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(module, 0)
    return deinterleave(num_heads, spec.head_dim) if num_heads else None


def latent_order(module: str, spec: ModelSpec) -> Longs | None:
    """Order of a projection of latent attention, where only the last rows of a head rotate.

    Source: transformers ``modeling_deepseek_v3``, ``apply_rotary_pos_emb_interleave``.
    """
    latent = spec.latent
    if latent is None:
        return None
    if module in ("q_proj", "q_b_proj"):
        num_heads, plain = spec.num_heads, latent.nope_dim
    elif module == "kv_a_proj_with_mqa":
        num_heads, plain = 1, latent.kv_rank
    else:
        return None
    head = np.concatenate(
        [np.arange(plain, dtype=np.int64), plain + deinterleave(1, latent.rope_dim)]
    )
    starts = np.arange(num_heads, dtype=np.int64) * len(head)
    rows: Longs = (starts[:, None] + head[None, :]).reshape(-1)
    return rows
