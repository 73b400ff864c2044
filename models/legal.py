"""Which shares a model can be cut by: all violated limits at once, and the nearest legal shares.

Almost everything can be done: heads, blocks and vocabularies that do not divide are cut unevenly
and KV heads are replicated. What is left are limits on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import ModelError
from models.spec import ModelSpec

GROUP = 32  # features that the kernels keep together


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One limit that given shares break.

    Attributes:
        what: the dimension, such as "attention heads".
        text: the whole sentence, with the numbers.
        found, limit: ranks (or stages) asked for, and how many there can be.
        nearest_shares, nearest_pipeline: legal ones nearest to those given; the same in every
            violation of one call.
    """

    what: str
    text: str
    found: int
    limit: int
    nearest_shares: tuple[float, ...]
    nearest_pipeline: tuple[float, ...]


class IllegalShares(ModelError):
    """Shares that a model cannot be cut by."""

    kind = "illegal_shares"

    def __init__(self, family: str, violations: Sequence[Violation]) -> None:
        super().__init__(family, [violation.text for violation in violations])
        self.family, self.violations = family, tuple(violations)

    def __str__(self) -> str:
        texts = "; ".join(violation.text for violation in self.violations)
        first = self.violations[0]
        return (
            f"this {self.family} model cannot be cut so: {texts}. Nearest that can: "
            f"tensor shares {_show(first.nearest_shares)}, "
            f"pipeline shares {_show(first.nearest_pipeline)}."
        )


def validate(
    spec: ModelSpec,
    shares: Sequence[float],
    pipeline: Sequence[float] = (1,),
    *,
    across: bool = False,
) -> list[Violation]:
    """Every constraint that these shares violate; empty if the model can be cut so.

    Args:
        spec: the model.
        shares: of the ranks of a tensor group, proportional to memory or speed.
        pipeline: of the stages.
        across: routed experts are dealt out whole instead of being cut.
    """
    found: list[tuple[str, str, int, int]] = []
    limits = tensor_limits(spec, across=across)
    for what, (have, limit) in limits.items():
        if len(shares) > limit:
            found.append((what, f"{len(shares)} tensor ranks, but {have}", len(shares), limit))
    if len(pipeline) > spec.num_layers:
        text = f"{len(pipeline)} pipeline stages, but {spec.num_layers} layers"
        found.append(("layers", text, len(pipeline), spec.num_layers))
    for what, given in (("tensor shares", shares), ("pipeline shares", pipeline)):
        bad = [share for share in given if not (math.isfinite(share) and share > 0)]
        if bad or not given:
            text = f"{what} must be positive numbers, at least one: {_show(given)}"
            found.append((what, text, len(given), len(given) - len(bad)))
    best = min(limit for _, limit in limits.values())
    nearest = _nearest(shares, best), _nearest(pipeline, spec.num_layers)
    return [
        Violation(
            what=what,
            text=text,
            found=count,
            limit=limit,
            nearest_shares=nearest[0],
            nearest_pipeline=nearest[1],
        )
        for what, text, count, limit in found
    ]


def check(
    spec: ModelSpec, shares: Sequence[float], pipeline: Sequence[float], *, across: bool = False
) -> None:
    """Raise IllegalShares with all that ``validate`` finds, if it finds anything."""
    violations = validate(spec, shares, pipeline, across=across)
    if violations:
        raise IllegalShares(spec.family, violations)


def tensor_limits(spec: ModelSpec, *, across: bool = False) -> dict[str, tuple[str, int]]:
    """Most tensor ranks that each dimension allows: ``what -> (what there is, ranks)``."""
    per_kv = spec.num_heads // spec.num_kv_heads
    limits = {
        "hidden size": (f"a hidden size of {spec.hidden_size}", spec.hidden_size),
        "attention heads": (f"{spec.num_heads} attention heads", spec.num_heads),
        "KV heads": (
            f"{spec.num_kv_heads} KV heads, each on at most {per_kv} ranks (its query heads)",
            spec.num_kv_heads * per_kv,
        ),
        "vocabulary": (f"a vocabulary of {spec.vocab_size}", spec.vocab_size),
    }
    experts = spec.experts
    if experts is None or experts.dense_layers:
        limits["FFN"] = (f"{spec.ffn_size} inner features", spec.ffn_size)
    if experts is not None:
        inner, count = experts.ffn_size, experts.num_experts
        limits["experts"] = (
            (f"{count} experts to deal out", count)
            if across
            else (f"{inner} inner features of an expert", inner)
        )
        if experts.num_shared:
            shared = experts.num_shared * inner
            limits["shared experts"] = (f"{shared} inner features of shared experts", shared)
    return limits


def num_blocks(size: int, unit: int) -> int:
    """Units that ``size`` features take; the last may be short."""
    return -(-size // unit)


def unit_for(size: int, unit: int, world: int) -> int:
    """The largest of ``unit``, 32 and 1 of which ``size`` features have one for every rank."""
    return next((u for u in (unit, GROUP) if u <= unit and num_blocks(size, u) >= world), 1)


def _nearest(shares: Sequence[float], limit: int) -> tuple[float, ...]:
    """The largest ``limit`` shares in their order; one that is no positive number is left out."""
    good = [i for i, share in enumerate(shares) if math.isfinite(share) and share > 0]
    kept = sorted(sorted(good, key=lambda i: (-shares[i], i))[:limit])
    return tuple(shares[i] for i in kept) or (1,)


def _show(shares: Sequence[float]) -> str:
    return ",".join(f"{share:g}" for share in shares) or "none"
