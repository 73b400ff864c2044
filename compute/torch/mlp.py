"""Feed-forward layers: one MLP, or experts of which each token uses a few.

Shape letters: N tokens, D hidden, F inner features, A active experts.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.torch.linear import Blocks, Linear
from compute.torch.routing import route
from compute.torch.step import Step
from compute.torch.weights import ExpertWeights, MlpWeights
from models.sharding import RankShard
from models.spec import Activation, ModelSpec


def mlp(weights: MlpWeights, activation: Activation, x_ND: Tensor, blocks: Blocks) -> Tensor:
    """This rank's share of an MLP: (N, D), to be summed over the ranks."""
    gate_NF, up_NF = blocks.linear(x_ND, weights.gate_up).chunk(2, dim=-1)
    gate_NF = F.silu(gate_NF) if activation == "silu" else F.gelu(gate_NF, approximate="tanh")
    return blocks.linear(gate_NF * up_NF, weights.down)


def experts(
    spec: ModelSpec,
    shard: RankShard,
    weights: ExpertWeights,
    n_ND: Tensor,
    step: Step,
    dtype: torch.dtype,
) -> Tensor:
    """This rank's share of a layer with experts: float32 (N, D), to be summed over the ranks.

    All ranks route alike; each adds what the experts that it has, whole or in part, make of the
    tokens that chose them.

    Args:
        n_ND: the normed residual in float32, from which the router chooses.
        dtype: what the experts multiply in.
    """
    assert spec.experts is not None
    logits = step.blocks.linear(n_ND, weights.router)
    weights_NA, ids_NA = route(logits, spec.experts, weights.score_bias)
    x_ND, active = n_ND.to(dtype), ids_NA.shape[1]
    if weights.shared is None:
        out_ND = torch.zeros_like(n_ND)
    else:
        out_ND = mlp(weights.shared, spec.activation, x_ND, step.blocks).float()
    ids, order = ids_NA.flatten().sort(stable=True)
    tokens, factors = order // active, weights_NA.flatten()[order]
    every = torch.arange(shard.experts.start, shard.experts.stop + 1, device=ids.device)
    bounds = torch.searchsorted(ids, every).tolist()
    for place, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        chosen = tokens[start:stop]
        expert = MlpWeights(
            gate_up=Linear(weights.gate_up[place]), down=Linear(weights.down[place])
        )
        made = mlp(expert, spec.activation, x_ND[chosen], step.alone(stop - start))
        out_ND.index_add_(0, chosen, made.float() * factors[start:stop, None])
    return out_ND
