"""Handshake, packets and EPMD against running stock nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bridge import epmd
from bridge.control_messages import (
    Demonitor,
    ExitSignal,
    Link,
    LinkExit,
    Monitor,
    MonitorDown,
    Send,
    SendAlias,
    SendName,
    SpawnReply,
    SpawnRequest,
    Tick,
    Unlink,
    UnlinkAck,
)
from bridge.epmd import Epmd
from bridge.epmd_codec import NodeEntry
from bridge.errors import HandshakeError, NameTaken
from bridge.flags import HIDDEN_NODE, MANDATORY, VISIBLE_NODE, Flag
from bridge.handshake import Acceptor, Established, Initiator, Local, Named, Status
from bridge.handshake_io import perform
from bridge.term import Atom, Pid, Ref
from bridge.wire import Decoder, Encoder, Event
from tests.bridge.golden.record_link import COOKIE, CREATION, NAME, PID, Side, linked
from tests.otp.stock import Erl, Otp, free_tcp_port, installations, stock_epmd
from tests.waiting import wait_until_async

pytestmark = [pytest.mark.erlang, pytest.mark.slow]
per_release = pytest.mark.parametrize("otp", installations(), ids=str)

ERL = "erl@127.0.0.1"
HOST = "127.0.0.1"


class Talk:
    """Messages over one link."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._encoder = Encoder(side.made.flags)
        self._decoder = Decoder(side.made.flags)
        self._events: list[Event] = self._decoder.feed(side.made.rest)

    def send(self, *messages: object) -> None:
        for message in messages:
            for packet in self._encoder.encode(message):  # type: ignore[arg-type]
                self._side.writer.write(packet)

    async def event(self) -> Event:
        """The next message, without ticks and what a stock node says to every newcomer."""
        async with asyncio.timeout(10):
            while True:
                while not self._events:
                    data = await self._side.reader.read(1 << 16)
                    assert data, "the stock node closed the link"
                    self._events += self._decoder.feed(data)
                found = self._events.pop(0)
                if not isinstance(found, Tick) and not (
                    isinstance(found, SendName) and found.to in ("rex", "global_name_server")
                ):
                    return found


VARIANTS = {
    "all": VISIBLE_NODE,
    "no_exit_payload": VISIBLE_NODE & ~int(Flag.EXIT_PAYLOAD),
    "no_fragments": VISIBLE_NODE & ~int(Flag.FRAGMENTS),
    "no_altact": VISIBLE_NODE & ~int(Flag.ALTACT_SIG),
    # SPAWN, and monitors by name, are what the conversation below needs besides.
    "least": MANDATORY | int(Flag.SPAWN | Flag.ALIAS | Flag.DIST_MONITOR | Flag.DIST_MONITOR_NAME),
}


@per_release
@pytest.mark.parametrize("variant", VARIANTS)
async def test_a_stock_node_understands_every_message(otp: Otp, variant: str) -> None:
    async with linked(otp, VARIANTS[variant]) as (erl, side):
        talk = Talk(side)
        me = await erl.eval("register(shell_, self()), process_flag(trap_exit, true), self()")
        big = bytes(range(256)) * 1000  # 256,000 bytes: fragments, where agreed
        talk.send(Send(PID, me, (1, big)), SendName(PID, Atom("shell_"), (2, PID)))
        assert await erl.eval("receive {1, X} -> X end") == big
        assert await erl.eval("receive {2, Y} -> Y end") == PID
        alias = await erl.eval("alias()")
        talk.send(SendAlias(PID, alias, (3, alias)))
        assert await erl.eval("receive {3, Z} -> Z end") == alias

        talk.send(Link(PID, me), LinkExit(PID, me, [Atom("bye"), big]))
        exit_tuple = await erl.eval("receive {'EXIT', _, [bye | _]} = E -> E end")
        assert exit_tuple == (Atom("EXIT"), PID, [Atom("bye"), big])
        talk.send(Link(PID, me), Unlink(9, PID, me))
        assert await talk.event() == UnlinkAck(9, me, PID)
        talk.send(ExitSignal(PID, me, Atom("stop")))
        assert await erl.eval("receive {'EXIT', From, stop} -> From end") == PID

        ref, other = Ref(NAME, CREATION, (1, 2, 3)), Ref(NAME, CREATION, (4, 5, 6))
        victim = await erl.eval("V = spawn(fun() -> receive {die, R} -> exit(R) end end)")
        talk.send(Monitor(PID, victim, other), Demonitor(PID, victim, other))
        talk.send(Monitor(PID, victim, ref), Send(PID, victim, (Atom("die"), [1])))
        assert await talk.event() == MonitorDown(victim, PID, ref, [1])
        talk.send(Monitor(PID, Atom("nobody"), other))
        assert await talk.event() == MonitorDown(Atom("nobody"), PID, other, Atom("noproc"))

        request = Ref(NAME, CREATION, (7, 8, 9))
        options = [Atom("monitor")]
        mfa = (Atom("erlang"), Atom("exit"), [(Atom("made"), 5)])
        talk.send(SpawnRequest(request, PID, PID, *mfa, options))
        reply = await talk.event()
        assert isinstance(reply, SpawnReply)
        assert (reply.id, reply.to, reply.linked, reply.monitored) == (request, PID, False, True)
        made = reply.result
        assert isinstance(made, Pid)
        assert await talk.event() == MonitorDown(made, PID, request, (Atom("made"), 5))

        await erl.eval("M = monitor(process, P)")
        await erl.eval("Q = spawn_link(fun() -> link(P), receive after infinity -> ok end end)")
        monitor = await talk.event()
        assert isinstance(monitor, Monitor)
        link = await talk.event()
        assert isinstance(link, Link)
        talk.send(MonitorDown(PID, me, monitor.ref, (Atom("gone"), big)))
        down = await erl.eval("receive {'DOWN', M, process, P, {gone, B2}} -> B2 end")
        assert down == big
        await erl.eval("exit(Q, kill)")
        assert await talk.event() == LinkExit(link.sender, PID, Atom("killed"))


@asynccontextmanager
async def stock_node(otp: Otp, *args: str) -> AsyncIterator[tuple[Erl, int, int]]:
    """A stock node registered with our EPMD server: it, its port, the EPMD's port."""
    keeper = Epmd(tcp_port=free_tcp_port())
    await keeper.start("keeper", 1)
    try:
        names = args or ("-name", ERL)
        async with Erl(otp, (*names, "-setcookie", COOKIE), keeper.tcp_port) as erl:
            found = await keeper.lookup("erl")
            yield erl, found.tcp_port if found else 0, keeper.tcp_port
    finally:
        await keeper.stop()


async def call(port: int, local: Local, peer: str = ERL) -> tuple[Established, Side]:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        made = await perform(Initiator(local, peer), reader, writer)
    except HandshakeError:
        writer.close()
        raise
    return made, Side(made, reader, writer)


@per_release
async def test_we_connect_to_a_stock_node_visible_and_hidden(otp: Otp) -> None:
    async with stock_node(otp) as (erl, port, _):
        for flags, kind in ((VISIBLE_NODE, "visible"), (HIDDEN_NODE, "hidden")):
            name = f"{kind}@127.0.0.1"
            made, side = await call(port, Local(name, COOKIE, CREATION, flags))
            assert (made.peer_name, made.visible) == (ERL, True)
            assert made.peer_creation == (await erl.eval("self()")).creation
            assert await erl.eval(f"nodes({kind})") == [Atom(name)]
            side.writer.close()


@per_release
async def test_refusals_of_a_stock_node_are_understood(otp: Otp) -> None:
    async with stock_node(otp) as (erl, port, _):
        with pytest.raises(HandshakeError, match="closed"):
            await call(port, Local("x@127.0.0.1", "wrong", CREATION))
        with pytest.raises(HandshakeError, match="answers not_allowed"):
            await call(port, Local("x@127.0.0.1", COOKIE, CREATION, MANDATORY & ~Flag.UTF8_ATOMS))
        with pytest.raises(HandshakeError, match="answers nok"):
            await call(port, Local(ERL, COOKIE, CREATION))
        assert await erl.eval("nodes()") == []


@per_release
async def test_a_second_link_of_the_same_node_replaces_the_first(otp: Otp) -> None:
    async with stock_node(otp) as (erl, port, _):
        local = Local("x@127.0.0.1", COOKIE, CREATION)
        _, first = await call(port, local)
        _, second = await call(port, local)  # the stock node answers "alive"
        async with asyncio.timeout(10):
            while await first.reader.read(4096):
                pass
        talk = Talk(second)
        me = await erl.eval("self()")
        talk.send(Send(Pid("x@127.0.0.1", 1, 0, CREATION), me, Atom("hi")))
        assert await erl.eval("receive hi -> nodes() end") == [Atom("x@127.0.0.1")]
        first.writer.close()
        second.writer.close()


@per_release
async def test_a_stock_node_gives_us_a_name(otp: Otp) -> None:
    async with stock_node(otp) as (erl, port, _):
        made, side = await call(port, Local(HOST, COOKIE, 0, HIDDEN_NODE | Flag.NAME_ME))
        assert made.local_name.endswith("@127.0.0.1")
        assert made.local_creation > 0
        assert await erl.eval("nodes(hidden)") == [Atom(made.local_name)]
        side.writer.close()


@asynccontextmanager
async def our_node(
    decide: Status | Named, cookie: str = COOKIE
) -> AsyncIterator[tuple[int, asyncio.Queue[Established | HandshakeError]]]:
    """A listener that takes stock nodes: the EPMD port, and how each handshake ended."""
    ends: asyncio.Queue[Established | HandshakeError] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        machine = Acceptor(Local(NAME, cookie, CREATION), decide=lambda _: decide)
        try:
            ends.put_nowait(await perform(machine, reader, writer))
            await reader.read()
        except (HandshakeError, OSError) as exc:
            ends.put_nowait(HandshakeError(str(exc)))
        finally:
            writer.close()

    server = await asyncio.start_server(accept, HOST, 0)
    keeper = Epmd(tcp_port=free_tcp_port())
    await keeper.start("py", server.sockets[0].getsockname()[1])
    try:
        yield keeper.tcp_port, ends
    finally:
        await keeper.stop()
        server.close()
        await server.wait_closed()


async def connect(otp: Otp, epmd_port: int, *args: str) -> tuple[bool, Atom]:
    # After "nok" a stock node waits this long for the other side's own attempt.
    quick = ("-kernel", "net_setuptime", "1")
    async with Erl(otp, (*args, *quick, "-setcookie", COOKIE), epmd_port) as erl:
        result = await erl.eval(f"net_kernel:connect_node('{NAME}')")
        node = await erl.eval("node()")
        return result, node


@per_release
async def test_stock_nodes_are_taken_refused_and_named(otp: Otp) -> None:
    async with our_node(Status.OK) as (port, ends):
        assert await connect(otp, port, "-name", ERL) == (True, ERL)
        made = await ends.get()
        assert isinstance(made, Established)
        assert (made.peer_name, made.visible) == (ERL, True)
        assert await connect(otp, port, "-name", ERL, "-hidden") == (True, ERL)
        made = await ends.get()
        assert isinstance(made, Established)
        assert not made.visible
    async with our_node(Status.NOK) as (port, ends):
        assert (await connect(otp, port, "-name", ERL))[0] is False
        assert "nok" in str(await ends.get())
    async with our_node(Status.OK, cookie="another") as (port, ends):
        assert (await connect(otp, port, "-name", ERL))[0] is False
        assert "cookies differ" in str(await ends.get())
    async with our_node(Named("u1@127.0.0.1", 77)) as (port, ends):
        assert await connect(otp, port, "-name", "undefined@127.0.0.1") == (True, "u1@127.0.0.1")
        made = await ends.get()
        assert isinstance(made, Established)
        assert (made.peer_name, made.peer_creation) == ("u1@127.0.0.1", 77)


@per_release
async def test_our_client_with_the_real_epmd(otp: Otp) -> None:
    async with stock_epmd(otp) as port:
        node = NodeEntry("py", 1234, hidden=True)
        registration = await epmd.register(node, HOST, port)
        assert registration.creation > 3
        assert await epmd.lookup("py", HOST, port) == node
        assert await epmd.lookup("nobody", HOST, port) is None
        with pytest.raises(NameTaken):
            await epmd.register(node, HOST, port)
        async with Erl(otp, ("-name", ERL), port) as erl:
            assert {name for name, _ in await epmd.names(HOST, port)} == {"py", "erl"}
            expected = sorted(([*name.encode()], at) for name, at in await epmd.names(HOST, port))
            assert await erl.eval("{ok, L} = net_adm:names(), lists:sort(L)") == expected
        registration.close()


@per_release
async def test_the_real_epmd_is_replaced_by_ours_when_it_dies(otp: Otp) -> None:
    async with stock_epmd(otp) as port:
        ours = Epmd(HOST, port)
        await ours.start("py", 1234)
        assert not ours.serving
    await wait_until_async(lambda: ours.serving and ours.registered, 10)
    assert await epmd.names(HOST, port) == [("py", 1234)]
    await ours.stop()


@per_release
async def test_stock_nodes_with_our_epmd(otp: Otp) -> None:
    async with stock_node(otp) as (erl, tcp_port, port):
        entry = await epmd.lookup("erl", HOST, port)
        assert entry is not None
        assert (entry.tcp_port, entry.hidden) == (tcp_port, False)
        assert (entry.highest_version, entry.lowest_version) == (6, 5)
        expected = [([*b"erl"], tcp_port), ([*b"keeper"], 1)]
        assert await erl.eval("{ok, L} = net_adm:names(), lists:sort(L)") == expected
        assert (await erl.eval("self()")).creation > 3
        async with Erl(otp, ("-name", "two@127.0.0.1", "-setcookie", COOKIE), port) as two:
            assert await two.eval(f"net_adm:ping('{ERL}')") == Atom("pong")
        with pytest.raises(AssertionError, match="ended"):
            async with Erl(otp, ("-name", ERL), port):
                pass
