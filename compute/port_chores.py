"""What a port does besides computing: import early what will be needed, connect to nodes."""

from __future__ import annotations

import asyncio

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Term

DIAL_S = 3.0
REDIAL_S = 0.2


def import_network() -> None:
    """What carries sums between machines: the libraries are large."""
    import compute.collectives_gloo
    import compute.collectives_host  # noqa: F401


async def dial(node: Atom, from_: Term, me: Process) -> None:
    """Connect to ``node`` and answer, trying again for ``DIAL_S``."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + DIAL_S
    answer: Term = Atom("ok")
    while not await me.node.connect(node, timeout_s=max(REDIAL_S, deadline_s - loop.time())):
        if loop.time() >= deadline_s:
            text = f"{me.node.name} cannot connect to {node} within {DIAL_S:g} s"
            answer = (Atom("error"), Atom("unreachable"), text)
            break
        await asyncio.sleep(REDIAL_S)
    gen_server.reply(me, from_, answer)


def import_engine() -> None:
    """Import the heavy packages while the port waits for orders, so that loading is short."""
    from compute.engine import warm_up

    warm_up()
