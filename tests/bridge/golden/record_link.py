"""Writes ``link.json``: the packets of a stock node that does all a node can do to another.

    python -m tests.bridge.golden.record_link

With every flag that OTP sends, the atom cache among them; and with ours, which decline it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bridge.epmd import Epmd
from bridge.errors import HandshakeError
from bridge.flags import VISIBLE_NODE, Flag
from bridge.handshake import Acceptor, Established, Local, Status
from bridge.handshake_io import perform
from bridge.term import Pid, Ref
from tests.bridge.golden.record import pack, unpack
from tests.otp.stock import Erl, Otp, free_tcp_port, installations

PATH = Path(__file__).parent / "link.json"
NAME = "py@127.0.0.1"
COOKIE = "golden"
CREATION = 7
PID = Pid(NAME, 5, 0, CREATION)
ALIAS = Ref(NAME, CREATION, (1, 2, 3, 4, 5))
FLAGS = {"ours": VISIBLE_NODE, "cached": VISIBLE_NODE | int(Flag.DIST_HDR_ATOM_CACHE)}

# Each line is a step of its own; what it sends is the packets of that name.
STEPS = {
    "send_name": "{reg, 'py@127.0.0.1'} ! {hello, true, world, hello, undefined}",
    "send": "P ! {hello, world, 'b\\x{e5}t', self()}",
    "send_fun": "P ! {hello, fun(X) -> {hello, X, P} end}",
    "send_traced": "seq_trace:set_token(label, 17), P ! hello, seq_trace:set_token([])",
    "send_fragments": "P ! {hello, world, binary:copy(<<7>>, 150000)}",
    "link": "link(P)",
    "unlink": "unlink(P)",
    "monitor": "M1 = monitor(process, P)",
    "demonitor": "demonitor(M1)",
    "monitor_name": "monitor(process, {reg, 'py@127.0.0.1'})",
    "exit": "exit(P, {hello, [1, 2]})",
    "link_exit": "{_, M2} = spawn_monitor(fun() -> link(P), exit({bye, P}) end),"
    " receive {'DOWN', M2, _, _, _} -> ok end",
    "send_alias": "A ! {hello, A}",
    "spawn": "spawn_request('py@127.0.0.1', mod, func, [1, hello], [link, monitor])",
    "group_leader": "group_leader(self(), P)",
}

# Priority messages came with OTP 28.
STEPS_28 = {
    "send_priority": "erlang:send(A, hello, [priority])",
    "exit_priority": "exit(A, hello, [priority])",
}


class Side:
    """Our end: one accepted link whose packets are handed out as they came."""

    def __init__(
        self, made: Established, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.made, self.reader, self.writer = made, reader, writer

    async def packet(self) -> bytes:
        """The next packet that is no tick, without its length."""
        while True:
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            if size:
                return await self.reader.readexactly(size)


@asynccontextmanager
async def linked(otp: Otp, flags: int) -> AsyncIterator[tuple[Erl, Side]]:
    """A stock node, and our side of its link to us."""
    sides: asyncio.Queue[Side | HandshakeError] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        machine = Acceptor(Local(NAME, COOKIE, CREATION, flags), decide=lambda _: Status.OK)
        try:
            sides.put_nowait(Side(await perform(machine, reader, writer), reader, writer))
        except HandshakeError as exc:
            sides.put_nowait(exc)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    epmd = Epmd(tcp_port=free_tcp_port())
    await epmd.start("py", server.sockets[0].getsockname()[1])
    args = ("-name", "erl@127.0.0.1", "-setcookie", COOKIE, "-connect_all", "false")
    try:
        async with Erl(otp, args, epmd.tcp_port) as erl:
            assert await erl.eval(f"net_kernel:connect_node('{NAME}')") is True
            side = await sides.get()
            if isinstance(side, HandshakeError):
                raise side
            await erl.eval("ok", P=PID, A=ALIAS)
            yield erl, side
            side.writer.close()
    finally:
        await epmd.stop()
        server.close()
        await server.wait_closed()


async def collect(otp: Otp, flags: int) -> dict[str, list[bytes]]:
    """The packets of each step; steps end where a marker message arrives."""
    found: dict[str, list[bytes]] = {}
    async with linked(otp, flags) as (erl, side), asyncio.timeout(20):
        steps = STEPS | (STEPS_28 if otp.release >= 28 else {})
        for name, text in {"connect": "ok", **steps}.items():
            await erl.eval(f"{text}, {{marker, '{NAME}'}} ! 16#7e7e7e7e")
            found[name] = []
            while not (packet := await side.packet()).endswith(b"b\x7e\x7e\x7e\x7e"):
                found[name].append(packet)
            # With the cache the marker introduces atoms, too: without it later packets are lost.
            found[name].append(packet)
    return found


async def _record() -> dict[str, dict[str, list[str]]]:
    return {
        f"{otp}-{kind}": {
            name: [pack(packet) for packet in packets]
            for name, packets in (await collect(otp, flags)).items()
        }
        for otp in installations()
        for kind, flags in FLAGS.items()
    }


def load() -> dict[str, dict[str, list[bytes]]]:
    """Release and flags ("otp28-cached") -> step -> packets."""
    recorded = json.loads(PATH.read_text())
    return {
        run: {name: [unpack(text) for text in packets] for name, packets in steps.items()}
        for run, steps in recorded.items()
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(asyncio.run(_record()), indent=1) + "\n")
