"""Flags and arguments that several commands share, and what they mean."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from bridge.term import Atom, Term
from ops.client import Target
from ops.errors import BadUsage
from ops.home import find_home

_SHARE = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar="PHALANX_HOME",
        metavar="DIR",
        show_default="~/.phalanx",
        help="Folder with everything a node writes: speak to the node that runs on it.",
    ),
]
NodeOption = Annotated[
    str | None,
    typer.Option(
        "--node",
        metavar="NODE",
        help="Speak to this node (NAME@HOST, found through EPMD), with the cookie of --home.",
    ),
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", metavar="NODE", help="The machine that is to have it: NAME@HOST or HOST."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the data as JSON.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A card's id (see `ctl model list`), a local GGUF file or safetensors folder "
        "(written with a slash, such as ./folder), or hf:ORG/REPO\\[/FILE].",  # \\[: no markup
    ),
]

TensorOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Ranks that share every layer.")
]
PipelineOption = Annotated[
    int | None, typer.Option(metavar="M", min=1, help="Stages that hold a run of layers each.")
]
SharesOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="How much each rank takes of the whole, such as 2,1: one number a rank, stage by "
        "stage. Alone it makes that many tensor ranks.",
    ),
]
ExpertsOption = Annotated[
    str | None,
    typer.Option(
        metavar="inside|across",
        help="Cut every routed expert over the tensor ranks, or deal whole ones out.",
    ),
]
EngineOption = Annotated[
    str | None, typer.Option(metavar="torch|mlx", help="What multiplies the matrices.")
]
ContextOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Tokens of one request, prompt and answer together."),
]
SlotsOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Requests of full length that memory is for.")
]
ThreadsOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads a rank.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda:N, mlx, or cuda to deal ranks over all GPUs."),
]
GoalOption = Annotated[
    str | None,
    typer.Option(
        metavar="latency|throughput",
        help="What to be best at: one request alone (default), or all slots busy.",
    ),
]
ReplicasOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=16, help="Instances that should run.")
]
PriorityOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=-100,
        max=100,
        help="Who keeps its place where memory is short: more before less, 0 by default.",
    ),
]


def target(home: Path | None, node: str | None) -> Target:
    """What ``--home`` and ``--node`` name."""
    return Target(find_home(home), node)


def model_ref(model: str) -> str:
    """``model`` as the node must read it: a path of this folder becomes an absolute one."""
    if not model:
        raise BadUsage("MODEL is empty: name one of `ctl model list`")
    looks_local = "/" in model or os.sep in model or model.lower().endswith(".gguf")
    path = Path(model).expanduser()
    if looks_local and not model.startswith("hf:") and path.exists():
        return str(path.absolute())
    return model


def load_options(
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
    shares: str | None = None,
    experts: str | None = None,
    engine: str | None = None,
    context: int | None = None,
    slots: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    goal: str | None = None,
    replicas: int | None = None,
    priority: int | None = None,
) -> dict[Term, Term]:
    """The map that ``load`` and ``place`` take; what was not given is left to the cluster.

    Raises:
        BadUsage: ``shares`` is no list of positive numbers.
    """
    given: dict[str, Term] = {
        "tensor": tensor,
        "pipeline": pipeline,
        "shares": None if shares is None else _numbers(shares),
        "experts": experts,
        "engine": engine,
        "context": context,
        "slots": slots,
        "threads": threads,
        "device": device,
        "goal": goal,
        "replicas": replicas,
        "priority": priority,
    }
    return {Atom(name): value for name, value in given.items() if value is not None}


def _numbers(text: str) -> list[int | float]:
    parts = [part.strip() for part in text.split(",")]
    if not all(_SHARE.fullmatch(part) and float(part) > 0 for part in parts):
        raise BadUsage(f"--shares {text!r}: write positive numbers, such as 2,1")
    return [float(part) if "." in part else int(part) for part in parts]
