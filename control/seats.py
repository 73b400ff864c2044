"""Which devices of which machines may take a rank, and which machines may not and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from control.cost_model import UNMEASURED, Seat, Speed
from control.placement_request import Host, Request
from control.placement_types import MEMORY
from models.footprint import kernels_for
from models.spec import ModelSpec

COMPUTE = "compute"
Speeds = Mapping[tuple[str, str], Speed]  # by node and device, such as ``cpu:0``


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A machine of the cluster as placement sees it.

    Attributes:
        roles: of ``coordinator``, ``compute`` and ``storage``.
        has_files: of the model that is placed.
    """

    host: Host
    roles: frozenset[str] = frozenset({COMPUTE})
    has_files: bool = False


@dataclass(frozen=True, slots=True)
class Fenced:
    """A machine that takes no rank, and why."""

    node: str
    why: str


def seats_of(
    request: Request, members: Sequence[Member], spec: ModelSpec, speeds: Speeds
) -> tuple[dict[str, list[Seat]], list[Fenced]]:
    """Devices by the engine that would run there, and machines without any; in order of names.

    A machine with CUDA devices gives one seat each, else one for all its cores; ``device`` and
    ``engine`` of the request narrow that down.
    """
    found: dict[str, list[Seat]] = {}
    fenced = []
    for member in sorted(members, key=lambda member: member.host.name):
        host = member.host
        if COMPUTE not in member.roles:
            roles = ", ".join(sorted(member.roles)) or "no role"
            fenced.append(Fenced(host.name, f"has no compute role ({roles})"))
            continue
        if request.threads > host.cores:
            why = f"lends {host.cores} cores, threads={request.threads} was asked for"
            fenced.append(Fenced(host.name, why))
            continue
        devices = _devices(request, host)
        if not devices:
            asked = request.device or request.engine
            fenced.append(Fenced(host.name, f"has no device for {asked!r}"))
        for device, told, free_bytes in devices:
            kind = device.partition(":")[0]
            engine = "mlx" if kind == "mlx" else "torch"
            speed = speeds.get((host.name, device))
            found.setdefault(engine, []).append(
                Seat(
                    node=host.name,
                    kind=kind,
                    device=device,
                    told=told,
                    pool=device if kind == "cuda" else MEMORY,
                    kernels=kernels_for(spec, device),
                    threads=request.threads or max(1, host.cores // len(devices)),
                    free_bytes=free_bytes,
                    speed=speed or UNMEASURED[kind],
                    measured=speed is not None,
                    figures="mlx-cpu" if kind == "mlx" and not host.has_metal else "",
                )
            )
    return found, fenced


def _devices(request: Request, host: Host) -> list[tuple[str, str, int]]:
    """``(device, what its port is told, bytes)``."""
    asked, engine = request.device, request.engine
    room = max(0, host.limit_bytes - host.used_bytes)
    wants_mlx = engine == "mlx" or asked.startswith("mlx")
    if wants_mlx or (host.has_metal and host.has_mlx and not (engine or asked)):
        return [("mlx:0", "mlx", room)] if host.has_mlx else []
    cuda = [(f"cuda:{i}", f"cuda:{i}", size) for i, size in enumerate(host.cuda_free_bytes)]
    if asked.startswith("cuda"):
        return [one for one in cuda if ":" not in asked or one[0] == asked]
    if cuda and not asked:
        return cuda
    return [("cpu:0", "cpu", room)]
