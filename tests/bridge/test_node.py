"""Two Python nodes, and hostile peers made of the sans-I/O parts: connections as such."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bridge import gen_server
from bridge.control_messages import Message, Send, SendName, Tick
from bridge.epmd import Epmd
from bridge.flags import VISIBLE_NODE
from bridge.gen_server import GenServer
from bridge.handshake import Initiator, Local
from bridge.handshake_io import perform
from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import Exit
from bridge.term import Atom, Pid, Ref, Term
from bridge.wire import Decoder, Encoder
from tests.otp.stock import free_tcp_port
from tests.waiting import wait_until_async

A = Atom
WAIT_S = 5.0
COOKIE = "cookie"
HERE, THERE = "here@127.0.0.1", "there@127.0.0.1"


class Echo(GenServer):
    async def handle_call(self, request: Term, from_: Term) -> Term:
        return request


@contextlib.asynccontextmanager
async def started(name: str = HERE, cookie: str = COOKIE, **options: Any) -> AsyncIterator[Node]:
    node = Node(name, cookie, **options)
    await node.start(listen=("127.0.0.1", 0), epmd=None)
    try:
        yield node
    finally:
        await node.stop()


@contextlib.asynccontextmanager
async def pair(**options: Any) -> AsyncIterator[tuple[Node, Node]]:
    async with started(HERE, **options) as here, started(THERE, **options) as there:
        assert await here.connect(THERE, address=there.address, timeout_s=WAIT_S)
        yield here, there


@contextlib.asynccontextmanager
async def raw_peer(
    node: Node, name: str = "raw@127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, Encoder]]:
    """A peer that has shaken hands and then does as the test pleases."""
    assert node.address is not None
    reader, writer = await asyncio.open_connection(*node.address)
    machine = Initiator(Local(name, COOKIE, 7, VISIBLE_NODE), node.name)
    found = await perform(machine, reader, writer)
    try:
        yield reader, writer, Encoder(found.flags)
    finally:
        writer.close()


async def decoded(reader: asyncio.StreamReader, flags: int) -> Message:
    """The next message of the link that goes to ``raw_peer``."""
    decoder = Decoder(flags)
    while True:
        for event in decoder.feed(await reader.read(65536)):
            if not isinstance(event, Tick):
                return event


async def until_exit(me: Process) -> None:
    while True:
        match await me.receive():
            case ("exit", reason):
                raise Exit(reason, quiet=True)


async def test_calls_and_lists_of_nodes() -> None:
    async with pair() as (here, there):
        await wait_until_async(there.nodes, WAIT_S)
        assert (here.nodes(), there.nodes()) == ([A(THERE)], [A(HERE)])
        await gen_server.start(there, Echo(), name="echo")
        with here.open_process() as me:
            for term in (1, [2.5], {b"k": (A("x"), bytes(200_000))}):
                assert await gen_server.call(me, ("echo", THERE), term) == term
        assert await here.connect(HERE)
        assert await there.connect(HERE, timeout_s=WAIT_S)


async def test_signals_cross_as_they_do_at_home() -> None:
    async with pair() as (here, there):
        with here.open_process() as me:
            me.trap_exit = True
            pid = there.spawn(until_exit)
            me.link(pid)
            ref = me.monitor(pid)
            me.send(pid, (A("exit"), A("why")))
            got = [await me.receive(timeout_s=WAIT_S) for _ in range(2)]
            assert (A("EXIT"), pid, A("why")) in got
            assert (A("DOWN"), ref, A("process"), pid, A("why")) in got
            pid = there.spawn(until_exit)
            me.link(pid)
            me.unlink(pid)
            ref = me.monitor(pid)
            me.exit(pid, A("kill"))
            down = await me.receive(timeout_s=WAIT_S)
            assert down == (A("DOWN"), ref, A("process"), pid, A("killed"))
            assert me.links == {}
            assert there.processes()[-1].pid != pid


async def test_an_exit_reason_that_no_term_can_hold_still_gets_through() -> None:
    async with pair() as (here, there):
        with here.open_process() as me:
            pid = there.spawn(until_exit)
            ref = me.monitor(pid)
            await wait_until_async(lambda: there.process(pid).monitored_by, WAIT_S)  # type: ignore[union-attr]
            with there.open_process() as other:
                other.exit(pid, object())
            down = await me.receive(timeout_s=WAIT_S)
            assert down[1] == ref
            assert down[4][0] == A("unencodable")


async def test_disconnect_reaches_links_monitors_and_watchers_on_both_sides() -> None:
    async with pair() as (here, there):
        pid = there.spawn(until_exit)
        with here.open_process() as me, there.open_process() as other:
            me.trap_exit = True
            other.trap_exit = True
            other.monitor_node(HERE)
            me.link(pid)
            ref = me.monitor(pid)
            await wait_until_async(lambda: there.process(pid).monitored_by, WAIT_S)  # type: ignore[union-attr]
            assert here.disconnect(THERE)
            assert not here.disconnect(THERE)
            got = [await me.receive(timeout_s=0) for _ in range(2)]
            assert (A("EXIT"), pid, A("noconnection")) in got
            assert (A("DOWN"), ref, A("process"), pid, A("noconnection")) in got
            assert await other.receive(timeout_s=WAIT_S) == (A("nodedown"), A(HERE))
            assert there.process(pid) is None
            # The address is remembered: sending connects again.
            await gen_server.start(there, Echo(), name="echo")
            assert await gen_server.call(me, ("echo", THERE), 1) == 1


async def test_simultaneous_connects_leave_one_link() -> None:
    async with started(HERE) as here, started(THERE) as there:
        await gen_server.start(there, Echo(), name="echo")
        for _ in range(20):
            got = await asyncio.gather(
                here.connect(THERE, address=there.address, timeout_s=WAIT_S),
                there.connect(HERE, address=here.address, timeout_s=WAIT_S),
            )
            assert all(got)
            assert await gen_server.node_call(here, ("echo", THERE), 1) == 1
            assert here.disconnect(THERE)
            await wait_until_async(lambda: not there.nodes(), WAIT_S)


async def test_a_node_that_comes_back_under_its_name_replaces_its_old_link() -> None:
    async with pair() as (here, there), started(THERE) as again:
        old = there.spawn(until_exit)
        new = again.spawn(until_exit)
        with here.open_process() as me:
            ref = me.monitor(old)
            assert await again.connect(HERE, address=here.address, timeout_s=WAIT_S)
            down = await me.receive(timeout_s=WAIT_S)
            assert down[1:] == (ref, A("process"), old, A("noconnection"))
            me.monitor(new)
            me.exit(new, A("kill"))
            assert (await me.receive(timeout_s=WAIT_S))[4] == A("killed")
            ref = me.monitor(old)  # a pid of its earlier life
            assert (await me.receive(timeout_s=WAIT_S))[4] == A("noproc")


async def test_a_wrong_cookie_is_refused_and_never_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with started(HERE) as here, started(THERE, cookie="another") as there:
        assert not await there.connect(HERE, address=here.address, timeout_s=WAIT_S)
        assert here.nodes() == there.nodes() == []
    texts = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(texts) == 2
    assert all("cookie" in text for text in texts)
    assert "another" not in caplog.text


async def test_bytes_without_a_handshake_reach_nobody() -> None:
    async with started() as here:
        got: list[Term] = []

        async def collect(me: Process) -> None:
            while True:
                got.append(await me.receive())

        here.spawn(collect, name="server")
        assert here.address is not None
        sender = Pid("raw@127.0.0.1", 1, 0, 7)
        packets = Encoder(VISIBLE_NODE).encode(SendName(sender, A("server"), 1))
        reader, writer = await asyncio.open_connection(*here.address)
        writer.write(b"".join(packets))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert got == []


async def test_a_broken_packet_closes_its_link_and_nothing_else() -> None:
    async with started() as here, raw_peer(here) as (reader, writer, encoder):
        await gen_server.start(here, Echo(), name="echo")
        async with raw_peer(here, "good@127.0.0.1"):
            writer.write(b"\0\0\0\x04\x83D\0\xff")
            with contextlib.suppress(ConnectionError):
                while await reader.read(4096):
                    pass
            await wait_until_async(lambda: here.nodes() == [A("good@127.0.0.1")], WAIT_S)
            assert await gen_server.node_call(here, "echo", 1) == 1
        del encoder


async def test_messages_for_what_is_not_there_do_no_harm() -> None:
    async with started() as here, raw_peer(here) as (reader, writer, encoder):
        flags = VISIBLE_NODE
        sender = Pid("raw@127.0.0.1", 1, 0, 7)
        for message in (
            Send(sender, Pid(HERE, 99, 0, here.creation), 1),
            Send(sender, Pid("elsewhere@127.0.0.1", 99, 0, 1), 1),
            SendName(sender, A("nobody"), 1),
            SendName(sender, A("rex"), (sender, A("features_request"))),
        ):
            writer.write(b"".join(encoder.encode(message)))
        from_ = (sender, Ref("raw@127.0.0.1", 7, (1, 2, 3)))
        ping = (A("$gen_call"), from_, (A("is_auth"), A("raw@127.0.0.1")))
        writer.write(b"".join(encoder.encode(SendName(sender, A("net_kernel"), ping))))
        assert await decoded(reader, flags) == Send(
            here.whereis("net_kernel"), sender, (from_[1], A("yes"))
        )


async def test_a_peer_that_does_not_read_is_dropped_at_the_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with started(max_outbound_bytes=1 << 20) as here, raw_peer(here) as (reader, _, _):
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        with here.open_process() as me:
            me.monitor_node("raw@127.0.0.1")
            sent_bytes = 0
            while "raw@127.0.0.1" in here.nodes():
                me.send(Pid("raw@127.0.0.1", 1, 0, 7), bytes(100_000))
                sent_bytes += 100_000
                assert sent_bytes < 100 << 20
                assert here.outbound_bytes("raw@127.0.0.1") < 2 << 20
                await asyncio.sleep(0)
            assert await me.receive(timeout_s=WAIT_S) == (A("nodedown"), A("raw@127.0.0.1"))
    assert "too slow" in caplog.text


async def test_a_silent_peer_is_lost_after_the_tick_time_and_an_idle_one_is_kept() -> None:
    async with pair(net_ticktime_s=0.4) as (here, there), raw_peer(here):
        with here.open_process() as me:
            me.monitor_node("raw@127.0.0.1")
            assert await me.receive(timeout_s=WAIT_S) == (A("nodedown"), A("raw@127.0.0.1"))
        assert here.nodes() == [A(THERE)]
        assert there.nodes() == [A(HERE)]


async def test_unreachable_nodes_and_unusable_names() -> None:
    async with started() as here:
        port = free_tcp_port()
        for name in ("nobody@127.0.0.1", "no_host"):
            assert not await here.connect(name, address=("127.0.0.1", port), timeout_s=WAIT_S)
        with here.open_process() as me:
            ref = me.monitor(("server", "nobody@127.0.0.1"))
            down = await me.receive(timeout_s=WAIT_S)
            assert (down[1], down[4]) == (ref, A("noconnection"))


async def test_epmd_finds_nodes_and_refuses_a_second_of_the_same_name() -> None:
    port = free_tcp_port()
    here, there, twin = (Node(name, COOKIE) for name in (HERE, THERE, THERE))
    try:
        await here.start(listen=("127.0.0.1", 0), epmd=Epmd("127.0.0.1", port))
        await there.start(listen=("127.0.0.1", 0), epmd=Epmd("127.0.0.1", port))
        with pytest.raises(Exception, match="there"):
            await twin.start(listen=("127.0.0.1", 0), epmd=Epmd("127.0.0.1", port))
        assert twin.processes() == []
        await gen_server.start(there, Echo(), name="echo")
        assert await gen_server.node_call(here, ("echo", THERE), 1) == 1
    finally:
        for node in (here, there, twin):
            await node.stop()
