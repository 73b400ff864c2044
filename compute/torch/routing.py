"""Which experts a token goes to, and with what weight: a pure function of the router's logits.

Shape letters: N tokens, E experts, A active experts, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.spec import ExpertSpec

TINY = 1e-20  # keeps a sum of scores that all vanish from dividing by zero


def route(
    logits_NE: Tensor, experts: ExpertSpec, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose experts for some tokens.

    Args:
        logits_NE: float32, the router's output.
        experts: the rule.
        bias_E: float32, added to the scores for the choice alone.

    Returns:
        ``(weights_NA, ids_NA)``: float32 factors on the experts' outputs, and int64 experts.

    Source: transformers ``modeling_mixtral``, ``modeling_qwen3_moe``, ``modeling_deepseek_v2``,
        ``modeling_deepseek_v3``; DeepSeek-V3 technical report, section 2.1.2.
    """
    scores_NE = logits_NE.softmax(-1) if experts.scoring == "softmax" else logits_NE.sigmoid()
    choice_NE = scores_NE if bias_E is None else scores_NE + bias_E
    if experts.num_active_groups < experts.num_groups:
        choice_NE = _limited(choice_NE, experts)
    ids_NA = choice_NE.topk(experts.num_active, dim=-1).indices
    weights_NA = scores_NE.gather(1, ids_NA)
    if experts.normalize:
        weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + TINY)
    return weights_NA * experts.scale, ids_NA


def _limited(choice_NE: Tensor, experts: ExpertSpec) -> Tensor:
    """The same scores, with those of all but the best groups out of reach."""
    by_group = choice_NE.unflatten(-1, (experts.num_groups, -1))
    if experts.group_score == "max":
        groups_NG = by_group.amax(-1)
    else:
        groups_NG = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
    best = groups_NG.topk(experts.num_active_groups, dim=-1).indices
    kept_NG = torch.zeros_like(groups_NG, dtype=torch.bool).scatter_(1, best, True)
    return by_group.masked_fill(~kept_NG[..., None], float("-inf")).flatten(-2)
