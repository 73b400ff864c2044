"""Registered names that a former owner has yet to give up.

When a supervisor is killed, its children hear of it and clean up; the next supervisor may
be there before they are gone, and would find their names, ports and files in use.
"""

from __future__ import annotations

import contextlib

from bridge.process import Process
from bridge.process_errors import ReceiveTimeout

FREE_S = 10.0


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
