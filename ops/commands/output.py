"""What ``ctl`` writes: data on stdout as JSON or tables, all else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

from rich.console import Console, RenderableType

PIPE_COLUMNS: Final = 200  # without a terminal nothing is cut or folded for lack of room


def show(data: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print ``data`` on stdout, as ``--json`` asks."""
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        console().print(render(data))


def console(*, stderr: bool = False) -> Console:
    """A console of this moment's stdout or stderr."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_COLUMNS, highlight=False)


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)
