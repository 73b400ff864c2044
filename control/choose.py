"""Where a model would run, on one machine or many: the one door to placement. Pure."""

from __future__ import annotations

from dataclasses import replace

from control.cost_model import UNMEASURED, Goal
from control.errors import NoPlacement
from control.fleet import Fleet
from control.load_options import BadOption
from control.placement import decide
from control.placement_request import Request
from control.placement_types import Placement
from control.planner import plan
from control.seats import Member
from models.spec import ModelSpec
from models.stored import Stored


def choose(
    request: Request,
    fleet: Fleet,
    spec: ModelSpec,
    stored: Stored | None,
    kind: str = "",
    *,
    goal: str = "",
    current: tuple[tuple[str, str], ...] = (),
) -> Placement:
    """Choose machines, a mesh, and everybody's share.

    One machine that computes is asked as ``placement.decide`` says. Several are planned over; a
    shape that was asked for and has more ranks than there are devices is put on one machine,
    where ranks share the cores.

    Args:
        request: what to place.
        fleet: machines that are up, with what other instances take and who has the files.
        spec: of the model; stored: its checkpoint, None where it is not downloaded.
        kind: the storage format to assume then.
        goal: ``latency`` or ``throughput``; empty means latency.
        current: ``(node, device)`` of the ranks that run already, which a move would restart.

    Returns:
        ``chosen`` is None where nothing fits; ``refusal`` says why. ``plan`` is set where several
        machines were looked at.

    Raises:
        BadOption: the only machine that computes does not have what was asked for.
    """
    computing = fleet.computing
    if not computing:
        return _nobody(request, fleet)
    if len(computing) == 1:
        return decide(request, (computing[0].host,), spec, stored, kind)
    found = plan(
        request,
        fleet.members,
        fleet.topology,
        spec,
        stored,
        fleet.speeds,
        kind=kind,
        goal=Goal(goal or Goal.LATENCY),
        current=current,
    )
    if found.chosen is None and request.shape is not None and request.shape.num_ranks > 1:
        together = _together(request, fleet, spec, stored, kind)
        if together is not None:
            return replace(together, plan=found)
    return replace(found.placement, plan=found)


def _together(
    request: Request, fleet: Fleet, spec: ModelSpec, stored: Stored | None, kind: str
) -> Placement | None:
    """The shape on one machine: the best one that has room for all its ranks."""

    def order(member: Member) -> tuple[bool, float, int, str]:
        host = member.host
        speed = fleet.speeds.get((host.name, "cpu:0"), UNMEASURED["cpu"])
        room = host.limit_bytes - host.used_bytes
        return not member.has_files, -speed.weights_per_s, -room, host.name

    for member in sorted(fleet.computing, key=order):
        try:
            found = decide(request, (member.host,), spec, stored, kind)
        except BadOption:  # the plan's refusal says what each machine lacks
            continue
        if found.chosen is not None:
            return found
    return None


def _nobody(request: Request, fleet: Fleet) -> Placement:
    roles = "; ".join(
        f"{one.host.name} is {', '.join(sorted(one.roles)) or 'without a role'}"
        for one in fleet.members
    )
    why = f"no machine has the role compute ({roles or 'no machine is up'})"
    return Placement(
        request=request,
        engine="torch",
        chosen=None,
        rejected=(),
        refusal=NoPlacement(request.model, "any shape", why),
    )
