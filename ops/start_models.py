"""What a node does first: load the models it was started for and say how far they are."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from bridge import gen_server
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Term
from bridge.text import text_of
from control.names import wait_for_names
from ops.start_settings import StartSettings

ASK_S = 30.0
POLL_S = 0.1
JOINING_S = 60.0
AGAIN_S = 0.5
NO_LEADER = ("leader_changed", "leader_lost", "no_leader", "no_authority")
STEP_PERCENT = 10
SETTLED = ("ready", "failed", "draining")


class StartFailed(Exception):
    """A model that the node was started for cannot be served."""


async def bring_up_models(node: Node, settings: StartSettings, *, first_life: bool) -> None:
    """Return once every start model answers. Raises StartFailed.

    A restart of the control process finds the desired state on disk and only waits for it;
    what fails then stays visible in ``ctl status`` and does not end the node.
    """
    with node.open_process(label="start models") as me:
        await wait_for_names(me, ("scheduler", "model_store", "instance_sup"))
        if first_life:
            mine = await _load_start_models(me, settings)
        else:
            mine = [id_ for id_, model in await _wanted(me) if model in settings.models]
        await _Progress().until_settled(me, mine, must_serve=first_life)


async def _load_start_models(me: Process, settings: StartSettings) -> list[str]:
    """Ask for each start model that is not wanted yet; ids of the instances to wait for."""
    if settings.no_model:
        await _ask(me, (Atom("forget_all"),))
        return []
    have = {model: id_ for id_, model in await _wanted(me)}
    asked = []
    for model in settings.models:
        if model in have:
            asked.append(have[model])
            continue
        asked.append(await _load(me, model))
    if settings.models:
        await _ask(me, (Atom("set_default"), settings.models[0]))
    return asked


async def _load(me: Process, model: str) -> str:
    """Ask for one model; again where the node joins a cluster just then. Raises StartFailed."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + JOINING_S
    while True:
        match await _ask(me, (Atom("load"), model, {})):
            case ("ok", id_):
                return text_of(id_)
            case ("error", kind, text):
                if str(kind) not in NO_LEADER or loop.time() > deadline_s:
                    raise StartFailed(text_of(text))
        await asyncio.sleep(AGAIN_S)
        for id_, wanted in await _wanted(me):  # what it joins may have it, or has been told
            if wanted == model:
                return id_


async def _wanted(me: Process) -> list[tuple[str, str]]:
    """``(instance id, model)`` of the desired state."""
    return [(text_of(i), text_of(m)) for i, m in await _ask(me, (Atom("wanted"),))]


async def _ask(me: Process, request: Term) -> Any:
    request = request[0] if len(request) == 1 else request
    return await gen_server.call(me, Atom("scheduler"), request, timeout_s=ASK_S)


class _Progress:
    """Prints each change once: a line a state, and one every ten per cent of a download."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    async def until_settled(self, me: Process, mine: list[str], *, must_serve: bool) -> None:
        """Wait until none of ``mine`` is on its way; others come up in their own time.

        Raises:
            StartFailed: one of them failed, and ``must_serve``.
        """
        while True:
            rows = [known for _, known in await _ask(me, (Atom("instances"),))]
            for row in rows:
                await self._show(me, row)
                if must_serve and row["state"] == "failed" and text_of(row["id"]) in mine:
                    raise StartFailed(
                        f"cannot serve {text_of(row['model'])}: {text_of(row['text'])}"
                    )
            settled = {text_of(row["id"]) for row in rows if row["state"] in SETTLED}
            if settled.issuperset(mine):
                return
            await asyncio.sleep(POLL_S)

    async def _show(self, me: Process, row: dict[Any, Term]) -> None:
        id_, text = text_of(row["id"]), str(row["state"])
        if text == "pulling":
            text += await self._pulled(me, text_of(row["model"]))
        if text == "failed":
            text += f": {text_of(row['text'])}"
        if self._shown.get(id_) != text:
            self._shown[id_] = text
            print(f"{id_}: {text}", file=sys.stderr, flush=True)

    async def _pulled(self, me: Process, model: str) -> str:
        try:
            answer = await gen_server.call(
                me, Atom("model_store"), (Atom("progress"), model), timeout_s=ASK_S
            )
        except gen_server.CallError:
            return ""
        match answer:
            case ("ok", dict(p)) if p["total_bytes"]:
                percent = 100 * p["done_bytes"] // p["total_bytes"]
                return (
                    f" {percent // STEP_PERCENT * STEP_PERCENT} % of "
                    f"{p['total_bytes'] / 1e6:.0f} MB"
                )
            case _:
                return ""
