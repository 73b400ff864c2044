"""``ctl status|nodes|topology|tree|place``: what the cluster is and what it would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import RenderableType

from bridge.term import Atom, Term
from control.json_view import to_json
from ops import placement_table, tables
from ops.client import Target, ask
from ops.commands.options import (
    ContextOption,
    DeviceOption,
    EngineOption,
    ExpertsOption,
    GoalOption,
    HomeOption,
    JsonOption,
    ModelArgument,
    NodeOption,
    PipelineOption,
    PriorityOption,
    ReplicasOption,
    SharesOption,
    SlotsOption,
    TensorOption,
    ThreadsOption,
    load_options,
    model_ref,
    target,
)
from ops.commands.output import show
from ops.errors import Refused


def status(home: HomeOption = None, node: NodeOption = None, json: JsonOption = False) -> None:
    """Show the cluster: its machines, its leader and what runs."""
    _show(target(home, node), Atom("status"), json, tables.status)


def nodes(home: HomeOption = None, node: NodeOption = None, json: JsonOption = False) -> None:
    """Show the machines, what they may do and what is free."""
    _show(target(home, node), Atom("nodes"), json, tables.nodes)


def topology(home: HomeOption = None, node: NodeOption = None, json: JsonOption = False) -> None:
    """Show the links between machines with measured latency and bandwidth."""
    _show(target(home, node), Atom("topology"), json, tables.topology)


def tree(home: HomeOption = None, node: NodeOption = None, json: JsonOption = False) -> None:
    """Show the live supervision tree with restart counts."""
    _show(target(home, node), Atom("tree"), json, tables.tree)


def place(
    model: ModelArgument,
    tensor: TensorOption = None,
    pipeline: PipelineOption = None,
    shares: SharesOption = None,
    experts: ExpertsOption = None,
    engine: EngineOption = None,
    context: ContextOption = None,
    slots: SlotsOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    goal: GoalOption = None,
    replicas: ReplicasOption = None,
    priority: PriorityOption = None,
    home: HomeOption = None,
    node: NodeOption = None,
    json: JsonOption = False,
) -> None:
    """Show which placement would be chosen, and why every other was not. Nothing is loaded.

    Where nothing fits the reason goes to stderr, and the exit status is 1.
    """
    options = load_options(
        tensor=tensor,
        pipeline=pipeline,
        shares=shares,
        experts=experts,
        engine=engine,
        context=context,
        slots=slots,
        threads=threads,
        device=device,
        goal=goal,
        replicas=replicas,
        priority=priority,
    )
    request = (Atom("place"), model_ref(model), options)
    found = to_json(ask(target(home, node), request))
    show(found, json, placement_table.placement)
    if not found["chosen"]:
        raise Refused("no_placement", found["why"])


def _show(
    whom: Target, request: Term, as_json: bool, render: Callable[[Any], RenderableType]
) -> None:
    show(to_json(ask(whom, request)), as_json, render)
