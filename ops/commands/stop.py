"""``ctl stop``: ask the node to drain and end, and wait until it has."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.term import Atom
from ops.client import ClusterClient, run
from ops.commands.options import HomeOption, NodeOption, target
from ops.errors import Refused
from ops.home import RunInfo

DRAIN_S = 60.0
NOW_S = 10.0
_POLL_S = 0.05


def stop(
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for requests in flight: drop them.")
    ] = False,
    home: HomeOption = None,
    node: NodeOption = None,
) -> None:
    """Let the node finish its requests, stop it, and wait until it is gone."""
    name = run(target(home, node), lambda client: _stop(client, now))
    typer.echo(f"stopped {name}")


async def _stop(client: ClusterClient, now: bool) -> str:
    timeout_s = NOW_S if now else DRAIN_S
    with client.node.open_process(label="stop") as me:
        me.monitor_node(client.name)
        await client.call((Atom("stop"), now))
        if client.run is not None:
            gone = await _process_gone(client.run, timeout_s)
        else:
            gone = await _link_gone(me, client.name, timeout_s)
    if not gone:
        next_step = "" if now else " Requests may still run; `ctl stop --now` drops them."
        raise Refused(
            "timeout", f"node {client.name} still runs {timeout_s:.0f} s later.{next_step}"
        )
    return client.name


async def _process_gone(info: RunInfo, timeout_s: float) -> bool:
    end_s = time.monotonic() + timeout_s
    while info.is_alive():
        if time.monotonic() >= end_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True


async def _link_gone(me: Process, node: str, timeout_s: float) -> bool:
    """A node elsewhere is gone when the link to it breaks."""
    try:
        await me.receive(
            lambda m: True if m == (Atom("nodedown"), Atom(node)) else None, timeout_s=timeout_s
        )
    except ReceiveTimeout:
        return False
    return True
