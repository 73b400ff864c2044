"""``ctl bench``: figures of the node that runs on this home, as a table or as JSON."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer
from rich.table import Table

from bridge.term import Atom
from control.json_view import to_json
from ops.client import ask
from ops.commands.options import HomeOption, JsonOption, NodeOption, target
from ops.commands.output import note, show
from ops.errors import NoNode, Refused


def bench(
    model: Annotated[str, typer.Argument(help="A loaded model.")] = "default",
    prompt_tokens: Annotated[int, typer.Option(min=16, help="Length of the prefill.")] = 500,
    decode_tokens: Annotated[int, typer.Option(min=16, help="Length of a decode run.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 3,
    chaos: Annotated[
        int, typer.Option(min=0, help="Kill a rank this many times while it generates.")
    ] = 0,
    home: HomeOption = None,
    node: NodeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure prefill, decode, batch and (with --chaos, on its own machine) recovery of a node."""
    # Slow to import, and only needed here.
    import httpx

    from ops.bench import serving

    url = str(to_json(ask(target(home, node), Atom("status")))["url"])
    plan = serving.Plan(
        prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, runs=runs, chaos=chaos
    )

    try:
        report = asyncio.run(serving.run(url, model, plan, say=note))
    except httpx.HTTPStatusError as exc:
        raise Refused("bench", str(exc)) from exc
    except httpx.HTTPError as exc:
        raise NoNode(f"{url} does not answer: {exc!r}") from exc
    except serving.TooShort as exc:
        raise Refused("bench", str(exc)) from exc
    show(report.to_json(), json, _table)


def _table(data: dict[str, Any]) -> Table:
    table = Table("figure", "value", box=None, title=f"Speed of {data['model']}")
    table.columns[1].justify = "right"
    table.add_row("prefill", f"{data['prefill']:.0f} tok/s")
    table.add_row("time to first token", f"{1000 * data['first_token_s']:.0f} ms")
    table.add_row("decode, one stream", f"{data['decode']:.1f} tok/s")
    for size, speed in data["batch"].items():
        table.add_row(f"decode, {size} streams together", f"{speed:.1f} tok/s")
    if data["recovery_s"]:
        table.add_row("ranks killed", str(len(data["recovery_s"])))
        table.add_row("pause of the stream, median", f"{data['recovery_median_s']:.2f} s")
        table.add_row("pause of the stream, longest", f"{data['recovery_max_s']:.2f} s")
        table.add_row("streams changed by a kill", str(data["changed_streams"]))
    return table
