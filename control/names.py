"""Registered names that a former owner has yet to give up, and those that are yet to come.

When a supervisor is killed, its children hear of it and clean up; the next supervisor may
be there before they are gone, and would find their names, ports and files in use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from bridge.process import Process
from bridge.process_errors import ReceiveTimeout

FREE_S = 10.0
TREE_UP_S = 60.0
POLL_S = 0.02


async def until_free(me: Process, name: str, *, timeout_s: float = FREE_S) -> None:
    """Return once nobody is registered as ``name``, or when the time is over."""
    owner = me.node.whereis(name)
    if owner is None:
        return
    with me.node.open_process(label=f"wait for {name}") as waiter:
        monitor = waiter.monitor(owner)
        with contextlib.suppress(ReceiveTimeout):
            await waiter.receive(
                lambda m: True if m[:2] == ("DOWN", monitor) else None, timeout_s=timeout_s
            )


async def wait_for_names(
    me: Process, names: Iterable[str], *, timeout_s: float = TREE_UP_S
) -> None:
    """Wait until all ``names`` are registered, or the time is over (the next call then says so)."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    # Names have no event; this runs at start-up only.
    while loop.time() < deadline_s and any(  # noqa: ASYNC110
        me.node.whereis(n) is None for n in names
    ):
        await asyncio.sleep(POLL_S)
