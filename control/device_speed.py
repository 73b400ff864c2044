"""How fast the devices of a machine are: what is told to others, and what is kept on disk.

A figure holds for a device's name, the cores that it lends and the kernels of this version; it
is measured once (``control.speed_meter``) and read from then on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.term import Atom, Term
from bridge.text import text_of
from control.cost_model import Speed
from control.machine import Machine

log = logging.getLogger("control.device_speed")


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
    return {
        text_of(one["device"]): checked(one["weights_per_s"], one["flops_per_s"]) for one in term
    }


def checked(weights_per_s: Any, flops_per_s: Any) -> Speed:
    """A speed that something can have. Raises TypeError, ValueError."""
    speed = Speed(float(weights_per_s), float(flops_per_s))
    for figure in (speed.weights_per_s, speed.flops_per_s):
        if not (math.isfinite(figure) and figure > 0):
            raise ValueError(f"a device of {weights_per_s} weights/s and {flops_per_s} flops/s")
    return speed


def devices_of(machine: Machine) -> dict[str, str]:
    """Devices that ranks may get, each with what its figures hold for."""
    found = {}
    for device in machine.devices:
        if device.kind == "cpu":
            found["cpu:0"] = f"{device.name}, {machine.cores} cores"
        elif device.kind == "cuda":
            number = sum(name.startswith("cuda") for name in found)
            found[f"cuda:{number}"] = device.name
        elif device.kind == "metal" and machine.has_mlx:
            found["mlx:0"] = f"{device.name} GPU"
    return found


def kernels_version() -> str:
    """Of the code that ranks compute with: another one may be faster or slower."""
    found = importlib.util.find_spec("compute")
    digest = hashlib.sha256()
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class SpeedFile:
    """What was measured on this machine, by device and kernels; without it all is measured again.

    Args:
        path: of a JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, version: str) -> dict[str, Speed]:
        """By what the figures hold for; those of other kernels are left out."""
        try:
            raw = json.loads(self._path.read_text())
            if raw["kernels"] != version:
                return {}
            return {str(what): checked(*figures) for what, figures in raw["speeds"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            log.warning("%s cannot be read: %s; devices are measured again", self._path, exc)
            return {}

    def write(self, version: str, speeds: Mapping[str, Speed]) -> None:
        """Keep these."""
        figures = {what: [s.weights_per_s, s.flops_per_s] for what, s in speeds.items()}
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps({"kernels": version, "speeds": figures}, indent=1))
            temporary.replace(self._path)
        except OSError as exc:
            log.warning("%s cannot be written: %s", self._path, exc)
