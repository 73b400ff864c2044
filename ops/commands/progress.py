"""Following what takes long (a download, a load) until it is done, and showing how far it is."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Any, Final

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from bridge.term import Atom, Term
from control.json_view import to_json
from ops.client import ClusterClient
from ops.commands.output import console, note
from ops.errors import Refused
from ops.tables import printable

POLL_S: Final = 0.2


class Meter:
    """One line on stderr: a bar on a terminal, else a line for each change of the text."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._bar: Progress | None = None
        self._text = ""

    def __enter__(self) -> Meter:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[what]}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, text: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        """Say what is done now; a total of 0 is not known."""
        text = printable(text)
        changed, self._text = text != self._text, text
        if self._bar is None:
            if changed:
                note(text)
            return
        if changed:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task("", what=text)
        self._bar.update(self._bar.task_ids[0], completed=done_bytes, total=total_bytes or None)


async def until_ready(client: ClusterClient, instance: str) -> dict[str, Any]:
    """Wait for an instance that is coming up; its map once it is ready.

    Raises:
        Refused: it failed, with the reason, or was unloaded meanwhile.
    """
    with Meter() as meter:
        while True:
            rows = to_json(await client.call(Atom("instances")))
            row = next((row for row in rows if row["id"] == instance), None)
            if row is None:
                raise Refused("unloaded", f"{instance} was unloaded before it was ready")
            match row["state"]:
                case "ready":
                    return dict(row)
                case "failed":
                    raise Refused("failed", f"{instance} failed: {row.get('text') or 'unknown'}")
                case "pulling":
                    with contextlib.suppress(Refused):  # then the instance says it itself, soon
                        await _show_pull(client, meter, row["model"])
                case state:
                    ranks = row.get("ranks") or []
                    meter.show(
                        f"{instance}: {state}",
                        sum(rank.get("load_done") or 0 for rank in ranks),
                        sum(rank.get("load_total") or 0 for rank in ranks),
                    )
            await asyncio.sleep(POLL_S)


async def until_pulled(client: ClusterClient, model: str, to: str | None = None) -> dict[str, Any]:
    """Wait for the files of a model; its entry in the catalogue once they are there.

    Args:
        to: the node that fetches; None is the one that is asked.

    Raises:
        Refused: the download failed, with the reason.
    """
    with Meter() as meter:
        while True:
            if await _show_pull(client, meter, model, to) == "done":
                break
            await asyncio.sleep(POLL_S)
    rows = to_json(await client.call(Atom("models")))
    known = (row for row in rows if model == row["id"] or model in row.get("aliases", []))
    found = dict(next(known, {"id": model, "state": "local"}))  # a path or hub reference has none
    return {**found, "state": "local", "node": to} if to else found


async def _show_pull(client: ClusterClient, meter: Meter, model: str, to: str | None = None) -> str:
    """Show how far a download is; its phase. Raises Refused: why the last one failed."""
    where: tuple[Term, ...] = (to,) if to else ()
    progress: dict[str, Any] = to_json(await client.call((Atom("pull_progress"), model, *where)))
    phase = str(progress["phase"])
    source = f" from {progress['source']}" if progress.get("source") else ""
    meter.show(f"{model}: {phase}{source}", progress["done_bytes"], progress["total_bytes"])
    return phase
