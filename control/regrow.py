"""Whether an instance that runs would do better elsewhere, now that machines have come."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Pid
from control import model_files
from control.cost_model import Goal
from control.errors import ControlError
from control.fleet import Fleet, read_fleet
from control.instance_spec import InstanceSpec
from control.load_options import LoadOptions
from control.placement_request import Defaults, Request
from control.planner import Plan, plan
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import ModelError

LEAST_GAIN: Final = 1.3  # times as fast, or it is not worth the interruption


async def weigh(
    me: Process,
    *,
    spec: InstanceSpec,
    options: LoadOptions,
    defaults: Defaults,
    used: Mapping[tuple[str, str], int],
    books: Pid,
) -> None:
    """Tell ``books`` ``{better, Id, Text}`` where there is a better place.

    Args:
        used: what others take, in bytes by node and pool.
    """
    try:
        fleet = (await read_fleet(me)).with_used(used)
        located = await model_files.locate(me.node, spec.model, fleet.nodes)
        sources = model_files.best_sources(located, fleet.roles, str(me.node.name))
        path = await model_files.header(me.node, spec.model, located, sources)
        fleet = fleet.with_files(sources)
        checkpoint = await asyncio.to_thread(open_checkpoint, path)
        request = Request.of(spec.model, options, checkpoint.spec, defaults)
        text = await asyncio.to_thread(better, spec, request, fleet, checkpoint, options.goal)
    except (ControlError, ModelError, gen_server.CallError):
        return  # it stays where it is
    if text:
        me.send(books, (Atom("better"), spec.id, text))


def better(
    spec: InstanceSpec, request: Request, fleet: Fleet, checkpoint: Checkpoint, goal: str
) -> str:
    """Why ``spec`` should be placed anew, or empty. Pure.

    Its machines alone, in its shape, are compared with all of them in any shape; the answer is
    empty where either cannot be estimated.
    """
    if len(fleet.computing) < 2:
        return ""
    now = _seconds(_plan(replace(request, shape=spec.shape), _only(fleet, spec), checkpoint, goal))
    found = _plan(request, fleet, checkpoint, goal)
    then = _seconds(found)
    if now is None or then is None or found.chosen is None or now < LEAST_GAIN * then:
        return ""
    if any((r.node, r.device) not in fleet.speeds for r in found.chosen.candidate.ranks):
        return ""  # nothing is moved for an assumption
    if any(node not in {name for name, _ in fleet.speeds} for node in spec.nodes):
        return ""
    nodes = sorted({rank.node for rank in found.chosen.candidate.ranks})
    return f"{found.chosen.candidate.shape} on {', '.join(nodes)} is {now / then:.1f} times as fast"


def _only(fleet: Fleet, spec: InstanceSpec) -> Fleet:
    return fleet.without([node for node in fleet.nodes if node not in spec.nodes])


def _plan(request: Request, fleet: Fleet, checkpoint: Checkpoint, goal: str) -> Plan:
    return plan(
        request,
        fleet.members,
        fleet.topology,
        checkpoint.spec,
        checkpoint,
        fleet.speeds,
        goal=Goal(goal or Goal.LATENCY),
    )


def _seconds(found: Plan) -> float | None:
    if found.chosen is None or found.chosen.estimate is None:
        return None
    return found.chosen.estimate.request_s
