"""Main loop of a port: one OS process, one rank. Started as ``python -m compute.port``.

A port is a hidden Erlang node that dials its control node and introduces itself to the
registered process ``ports`` there. When the link is lost it keeps its weights, dials
again for ``orphan_s`` seconds (a restarted control process adopts it), then ends.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Ref, Term
from compute.port_server import PortServer
from compute.port_settings import PortSettings

log = logging.getLogger("compute.port")

REDIAL_S = 0.2
HELLO_TIMEOUT_S = 5.0


def main() -> None:
    """Entry of the OS process."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the control process to handle
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    logging.getLogger("bridge.net_kernel").setLevel(logging.WARNING)  # it dials often when orphaned
    settings = PortSettings.read(sys.stdin.buffer)
    os.environ["PHALANX_CACHE_DIR"] = settings.cache_dir
    status = asyncio.run(_run(settings))
    sys.stderr.flush()
    os._exit(status)  # the engine thread may be deep in a kernel; nothing is left to save


async def _run(settings: PortSettings) -> int:
    tls = settings.tls.contexts() if settings.tls else None
    node = Node(settings.node, settings.cookie, hidden=True, tls=tls)
    await node.start(listen=None, epmd=Epmd(tcp_port=settings.epmd_port, bring=False))
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    loop = asyncio.get_running_loop()

    def end(status: int) -> None:
        """End the port; callable from any thread."""
        loop.call_soon_threadsafe(finish, status)

    def finish(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    server = PortServer(settings.port_id, end=end)
    pid = await gen_server.start(node, server, name="port")
    node.spawn(lambda me: _keep_owner(me, settings, server, end), label="owner link")
    node.spawn(lambda me: _beat(me, server, settings.beat_s), label="beat")
    with node.open_process(label="port main") as me:
        me.monitor(pid)
        watch = asyncio.ensure_future(me.receive(_is_down))
        await asyncio.wait({watch, ended}, return_when=asyncio.FIRST_COMPLETED)
        watch.cancel()
    return ended.result() if ended.done() else 0


def _is_down(message: Term) -> Term | None:
    return message if isinstance(message, tuple) and message[0] == "DOWN" else None


async def _beat(me: Process, server: PortServer, beat_s: float) -> None:
    while True:
        await asyncio.sleep(beat_s)
        server.beat()


async def _keep_owner(
    me: Process, settings: PortSettings, server: PortServer, end: Callable[[int], None]
) -> None:
    """Stay introduced to the owner; end the port when it is gone for good."""
    loop = asyncio.get_running_loop()

    def give_up() -> None:
        log.warning("no owner for %.0f s; the port ends", settings.orphan_s)
        end(0)

    while True:
        # A timer of its own: no slow attempt to connect can make an orphan live longer.
        doom = loop.call_later(settings.orphan_s, give_up)
        while (monitor := await _introduce(me, settings, server)) is None:  # noqa: ASYNC110
            await asyncio.sleep(REDIAL_S)
        doom.cancel()
        reason = await me.receive(partial(_reason_of_down, monitor))
        log.warning("the owner was lost: %s; dialling again", reason)


def _reason_of_down(monitor: Ref, message: Term) -> Term | None:
    match message:
        case ("DOWN", ref, _, _, reason) if ref == monitor:
            return reason
        case _:
            return None


async def _introduce(me: Process, settings: PortSettings, server: PortServer) -> Ref | None:
    """Dial the owner and say hello; the monitor on it, or None when it does not answer."""
    node = me.node
    if not await node.connect(settings.control_node, timeout_s=HELLO_TIMEOUT_S):
        return None
    owner = (Atom("ports"), Atom(settings.control_node))
    monitor = me.monitor(owner)
    server_pid = node.whereis("port")
    try:
        answer = await gen_server.call(
            me, owner, (Atom("hello"), server_pid, server.describe()), timeout_s=HELLO_TIMEOUT_S
        )
    except gen_server.CallError:
        answer = None
    if answer == "welcome":
        return monitor
    me.demonitor(monitor)
    if answer == "unknown":  # another life's port: nobody waits for these weights
        log.warning("the owner does not know this port; it ends")
        server.me.send(server.me.pid, (Atom("$gen_cast"), Atom("stop")))
    return None


if __name__ == "__main__":
    main()
