"""``ctl doctor``: looks at this machine and says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ops.commands.options import HomeOption, JsonOption
from ops.commands.output import show
from ops.config import Config, load
from ops.doctor import examine
from ops.heart import REFUSED
from ops.home import find_home
from ops.tables import printable

_STYLE = {"good": "green", "note": "yellow", "bad": "bold red"}


def doctor(
    home: HomeOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="config.yaml in the home, if there is one",
            help="Configuration that the node is, or would be, started with.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check this machine: memory, devices, ports, multicast, clock, and who is seen around it.

    Exit status 1 where something will not work; each such line says what to do.
    """
    found_home = find_home(home)
    file = config.expanduser().absolute() if config else None
    if file is None and found_home.config_file.exists():
        file = found_home.config_file
    findings = examine(found_home, load(file) if file else Config())
    show([asdict(finding) for finding in findings], json, _table)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(REFUSED)


def _table(rows: Sequence[dict[str, Any]]) -> RenderableType:
    made = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        state = Text(row["state"], _STYLE[row["state"]])
        made.add_row(state, row["what"], Text(printable(row["text"]), overflow="fold"))
    return made
