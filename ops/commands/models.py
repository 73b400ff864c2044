"""``ctl model list|pull|load|unload|swap|ps``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bridge.term import Atom, Term
from bridge.text import text_of
from control.json_view import to_json
from ops import tables
from ops.client import ClusterClient, ask, run
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
    ToOption,
    load_options,
    model_ref,
    target,
)
from ops.commands.output import show
from ops.commands.progress import until_pulled, until_ready
from ops.errors import Refused

LOAD_S = 90.0  # until the order is taken: files that are here are checked first
UNLOAD_S = 150.0  # requests in flight are waited for
SWAP_S = 2000.0  # a whole load, then a drain

app = typer.Typer(no_args_is_help=True, help="Models: what there is, and what runs.")


@app.command("list")
def list_(home: HomeOption = None, node: NodeOption = None, json: JsonOption = False) -> None:
    """Show the catalogue, and which models are on this machine or running."""
    show(to_json(ask(target(home, node), Atom("models"))), json, tables.models)


@app.command()
def ps(home: HomeOption = None, node: NodeOption = None, json: JsonOption = False) -> None:
    """Show the instances that run, and their ranks."""
    show(to_json(ask(target(home, node), Atom("instances"))), json, tables.instances)


@app.command()
def pull(
    model: ModelArgument,
    to: ToOption = None,
    home: HomeOption = None,
    node: NodeOption = None,
    json: JsonOption = False,
) -> None:
    """Download a model, so that loading it needs no network; an interrupted one goes on.

    It comes from the machines of the cluster that have it, else from outside.
    """
    wanted = model_ref(model)
    where: tuple[Term, ...] = (to,) if to else ()

    async def pulled(client: ClusterClient) -> dict[str, Any]:
        await client.call((Atom("pull"), wanted, *where))
        return await until_pulled(client, wanted, to)

    found = run(target(home, node), pulled)
    show(found, json, lambda data: tables.models([data]))


@app.command()
def load(
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
    """Download where needed, place and load a model, and wait until it answers.

    Without flags the cluster chooses the shape. Ctrl-C ends the waiting, not the load.
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
    request = (Atom("load"), model_ref(model), options)

    async def loaded(client: ClusterClient) -> dict[str, Any]:
        instance = text_of(await client.call(request, timeout_s=LOAD_S))
        return await until_ready(client, instance)

    show(run(target(home, node), loaded), json, lambda data: tables.instances([data]))


@app.command()
def unload(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|ID", help="A model, for all its instances, or one's id.")
    ],
    home: HomeOption = None,
    node: NodeOption = None,
    json: JsonOption = False,
) -> None:
    """Let the requests of a model's instances finish, then unload them."""
    wanted = model_ref(model)

    async def unloaded(client: ClusterClient) -> list[str]:
        rows = to_json(await client.call(Atom("instances")))
        models = await _model_ids(client, wanted)
        ids = [row["id"] for row in rows if row["id"] == wanted]
        ids = ids or [row["id"] for row in rows if row["model"] in models]
        if not ids:
            running = ", ".join(row["id"] for row in rows) or "none"
            raise Refused("not_found", f"no instance of {model!r} runs; running: {running}")
        for id_ in ids:
            await client.call((Atom("unload"), id_), timeout_s=UNLOAD_S)
        return ids

    ids = run(target(home, node), unloaded)
    show({"unloaded": ids}, json, tables.details)


@app.command()
def swap(
    old: Annotated[
        str, typer.Argument(metavar="OLD", help="The model that runs, or its instance.")
    ],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The model to run in its place.")],
    home: HomeOption = None,
    node: NodeOption = None,
    json: JsonOption = False,
) -> None:
    """Load NEW, let it take over, then unload OLD: no request fails."""
    request: Term = (Atom("swap"), model_ref(old), model_ref(new))

    async def swapped(client: ClusterClient) -> dict[str, Any]:
        instance = text_of(await client.call(request, timeout_s=SWAP_S))
        return await until_ready(client, instance)

    show(run(target(home, node), swapped), json, lambda data: tables.instances([data]))


async def _model_ids(client: ClusterClient, name: str) -> set[str]:
    """``name``, and the ids of models that have it as another name."""
    rows = to_json(await client.call(Atom("models")))
    return {name} | {row["id"] for row in rows if name in (row.get("aliases") or [])}
