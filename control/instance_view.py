"""What an instance shows of its ranks: CONTRACT section 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.term import Atom, Term
from bridge.text import text_of
from control.instance_spec import InstanceSpec

RANGES = ("layers", "kv_heads", "query_heads", "ffn", "vocab", "experts")  # half-open
SIZES = ("weights_bytes", "kv_bytes", "workspace_bytes")


def describe_rank(
    spec: InstanceSpec, rank: int, state: str, known: Mapping[Any, Any], facts: Mapping[Any, Term]
) -> dict[Any, Term]:
    """The map of a rank.

    Args:
        state: of the instance.
        known: what the rank's process says; facts: what its port said once it was loaded.
    """
    row: dict[Any, Term] = {
        Atom("rank"): rank,
        Atom("node"): Atom(spec.ranks[rank].node),
        Atom("os_pid"): known["os_pid"],
        Atom("state"): Atom(state),
        Atom("device"): facts.get("device", spec.ranks[rank].device or "cpu:0"),
        Atom("kernels"): facts.get("kernels", Atom("undefined")),
        Atom("memory_bytes"): known["memory_bytes"],
    }
    row |= {Atom(name): facts.get(name, []) for name in RANGES}
    row |= {Atom(name): facts.get(name, 0) for name in SIZES}
    if known["load_total"]:
        row[Atom("load_done")] = known["load_done"]
        row[Atom("load_total")] = known["load_total"]
    return row


def engine_of(facts: dict[Any, Term], placed: str) -> str:
    """Engine of a rank that is loaded: where nobody asked for one, the port chose it."""
    return "mlx" if text_of(facts.get("kernels", "")) == "mlx" else placed
