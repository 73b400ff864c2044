"""Shares that make the ranks deal layers out as the planner decided.

Ranks get shares, not layers: each works its part out by ``models.mesh``. So a decision has to be
said in shares from which that function comes to the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from control.load_options import MeshShape
from models.mesh import Costs, stages

_MOST = 1e12  # what a share may be
_READ = 8  # stages whose shares somebody might read


def shape_of(
    costs: Costs, layers: Sequence[range], shares: Sequence[tuple[float, ...]]
) -> MeshShape:
    """The shape whose mesh has these layers and, within each stage, these shares.

    Args:
        costs: of layers, as the ranks will weigh them.
        layers: of each stage.
        shares: whole numbers, with one sum for all stages.
    """
    tensor = len(shares[0])
    plain = [float(len(run)) for run in layers]
    few = len(layers) <= _READ
    if len(layers) == 1 or (few and stages(costs, plain) == tuple(layers)):
        weights = plain if len(layers) > 1 else [1.0]
    else:  # a stage's own cost: only this way do all have the same load
        weights = [costs.of(run.start, run.stop) for run in layers]
    flat = [
        weight * share for weight, stage in zip(weights, shares, strict=True) for share in stage
    ]
    common = math.gcd(*(int(share) for share in flat))
    flat = [share / common for share in flat]
    while max(flat) > _MOST:
        flat = [share / 2 for share in flat]  # exact
    return MeshShape(tensor, len(layers), tuple(flat))
