"""How fast the devices of a machine are, as its own figures and as machines tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.term import Atom, Term
from bridge.text import text_of
from control.cost_model import Speed


def speeds_term(speeds: Mapping[str, Speed]) -> list[Term]:
    """By device, such as ``cpu:0``; ``speeds_from`` reads it."""
    return [
        {
            Atom("device"): device,
            Atom("weights_per_s"): speed.weights_per_s,
            Atom("flops_per_s"): speed.flops_per_s,
        }
        for device, speed in sorted(speeds.items())
    ]


def speeds_from(term: Any) -> dict[str, Speed]:
    """Read ``speeds_term``'s answer. Raises KeyError, TypeError, ValueError."""
    found = {}
    for one in term:
        speed = Speed(float(one["weights_per_s"]), float(one["flops_per_s"]))
        if not (speed.weights_per_s > 0 and speed.flops_per_s > 0):
            raise ValueError(f"a device of {speed.weights_per_s} weights/s")
        found[text_of(one["device"])] = speed
    return found
