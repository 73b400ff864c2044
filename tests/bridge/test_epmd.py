"""EPMD: our client with our server, hostile clients, and the race to serve."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import epmd
from bridge.epmd import Epmd
from bridge.epmd_codec import MAX_REQUEST_BYTES, NodeEntry, alive_request, read_names, read_node
from bridge.epmd_server import EpmdServer
from bridge.errors import EpmdError, NameTaken
from tests.otp.stock import free_tcp_port
from tests.waiting import wait_until_async

HOST = "127.0.0.1"


async def serve(**settings: float) -> EpmdServer:
    server = EpmdServer(
        HOST,
        0,
        request_timeout_s=settings.get("request_timeout_s", 5.0),
        max_connections=int(settings.get("max_connections", 100)),
    )
    await server.start()
    return server


async def test_a_node_is_known_as_long_as_its_connection_lives() -> None:
    server = await serve()
    port = server.tcp_port
    node = NodeEntry("ph\u00e4", 1234, True, 6, 5, b"extra")
    registration = await epmd.register(node, HOST, port)
    assert registration.creation > 3
    assert await epmd.lookup("ph\u00e4", HOST, port) == node
    assert await epmd.names(HOST, port) == [("ph\u00e4", 1234)]
    with pytest.raises(NameTaken, match="ph\u00e4"):
        await epmd.register(node, HOST, port)
    registration.close()
    await wait_until_async(lambda: not server.nodes, 5)
    assert await epmd.lookup("ph\u00e4", HOST, port) is None
    second = await epmd.register(node, HOST, port)
    assert second.creation != registration.creation  # or old pids would seem alive
    await server.stop()
    await second.wait_lost()
    second.close()


async def test_old_nodes_get_the_short_creation() -> None:
    server = await serve()
    node = NodeEntry("old", 99, False, 5, 5)
    registration = await epmd.register(node, HOST, server.tcp_port)
    assert 1 <= registration.creation <= 3
    registration.close()
    await server.stop()


async def raw(port: int, request: bytes, *, finish: bool = True) -> bytes:
    """All that the server answers before it closes."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(request)
    if finish:
        writer.write_eof()
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"\0",
        b"\0\0",
        b"\0\x01",
        b"\xff\xff" + b"x" * 100,
        (MAX_REQUEST_BYTES + 1).to_bytes(2, "big") + b"x" * (MAX_REQUEST_BYTES + 1),
        b"\0\1k",  # KILL
        b"\0\4sabc",  # STOP a node
        b"\0\1d",  # DUMP
        b"\0\1\xff",
        b"\0\1x",  # ALIVE2 without anything
        b"\0\x0d" + b"x" + b"\0" * 12,
        b"\0\x0dx\1\1M\0\0\6\0\5\xff\xffa\0",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_bad_requests_close_their_own_connection_only(request_bytes: bytes) -> None:
    server = await serve()
    kept = await epmd.register(NodeEntry("kept", 7), HOST, server.tcp_port)
    assert await raw(server.tcp_port, request_bytes) == b""
    assert [node.name for node in server.nodes] == ["kept"]
    kept.close()
    await server.stop()


async def test_a_slow_client_is_cut_off_and_others_are_served() -> None:
    server = await serve(request_timeout_s=0.05)
    assert await raw(server.tcp_port, b"\0\x09z", finish=False) == b""
    assert await raw(server.tcp_port, b"", finish=False) == b""
    # A registration is no slow request: it may stay silent for ever.
    registration = await epmd.register(NodeEntry("a", 7), HOST, server.tcp_port)
    await raw(server.tcp_port, b"\0", finish=False)
    assert [node.name for node in server.nodes] == ["a"]
    registration.close()
    await server.stop()


async def test_connections_are_bounded() -> None:
    server = await serve(max_connections=3)
    held = [await epmd.register(NodeEntry(f"n{i}", 7), HOST, server.tcp_port) for i in range(3)]
    with pytest.raises(EpmdError):
        await epmd.names(HOST, server.tcp_port)
    held[0].close()
    await wait_until_async(lambda: len(server.nodes) == 2, 5)
    assert len(await epmd.names(HOST, server.tcp_port)) == 2
    for registration in held[1:]:
        registration.close()
    await server.stop()


@given(st.binary(max_size=80))
def test_random_answers_raise_nothing_but_epmd_errors(data: bytes) -> None:
    with contextlib.suppress(EpmdError):
        read_node(data, 0)
    with contextlib.suppress(EpmdError):
        read_names(b"\0\0\0\0" + data)


@given(
    st.builds(
        NodeEntry,
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=255),
        st.integers(0, 65535),
        st.booleans(),
        st.integers(0, 65535),
        st.integers(0, 65535),
        st.binary(max_size=50),
    )
)
def test_descriptions_survive_the_round_trip(node: NodeEntry) -> None:
    assert read_node(alive_request(node), 3) == node


@contextlib.asynccontextmanager
async def strange_epmd(answer: bytes | None) -> AsyncIterator[int]:
    """The port of something that answers every question so; None: never."""
    clients: set[asyncio.Task[None]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            if answer is None:
                await reader.read()
            else:
                await reader.read(100)
                writer.write(answer)
        writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.add(asyncio.create_task(serve_one(reader, writer)))

    async with await asyncio.start_server(accept, HOST, 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*clients)


@pytest.mark.parametrize(
    "answer", [b"", b"\x77", b"\x00\x00", b"\x77\0\0\1", b"w\0" + b"\xff" * 40]
)
async def test_a_strange_epmd_is_an_epmd_error(answer: bytes) -> None:
    async with strange_epmd(answer) as port:
        with pytest.raises(EpmdError):
            await epmd.lookup("a", HOST, port)
        with pytest.raises(EpmdError):
            await epmd.register(NodeEntry("a", 1), HOST, port)


async def test_a_silent_epmd_is_given_up() -> None:
    async with strange_epmd(None) as port:
        with pytest.raises(EpmdError, match=r"silent for 0.05 s"):
            await epmd.lookup("a", HOST, port, timeout_s=0.05)
        with pytest.raises(EpmdError, match=r"silent for 0.05 s"):
            await epmd.register(NodeEntry("a", 1), HOST, port, timeout_s=0.05)


async def test_nobody_there_is_an_epmd_error() -> None:
    with pytest.raises(EpmdError, match="no EPMD at"):
        await epmd.names(HOST, free_tcp_port())
    with pytest.raises(EpmdError, match="no EPMD at"):
        await Epmd(HOST, free_tcp_port(), bring=False).start("a", 1)


async def test_the_first_node_serves_and_the_next_takes_over() -> None:
    port = free_tcp_port()
    nodes = [Epmd(HOST, port) for _ in range(3)]
    creations = [await node.start(f"n{i}", 100 + i) for i, node in enumerate(nodes)]
    assert len(set(creations)) == 3
    assert [node.serving for node in nodes] == [True, False, False]
    await nodes[0].stop()
    await wait_until_async(lambda: nodes[1].serving or nodes[2].serving, 10)
    async with asyncio.timeout(10):
        while sorted(await epmd.names(HOST, port)) != [("n1", 101), ("n2", 102)]:
            pass
    assert [node.serving for node in nodes].count(True) == 1
    first_again = Epmd(HOST, port)
    await first_again.start("n0", 100)
    assert not first_again.serving
    found = await first_again.lookup("n0")
    assert found is not None
    assert found.tcp_port == 100
    for node in (first_again, *nodes[1:]):
        await node.stop()


async def test_a_taken_name_leaves_nothing_behind() -> None:
    port = free_tcp_port()
    owner, other = Epmd(HOST, port), Epmd(HOST, port)
    await owner.start("same", 1)
    with pytest.raises(NameTaken):
        await other.start("same", 2)
    await other.stop()
    await owner.stop()
    await other.start("same", 2)
    assert other.serving
    await other.stop()
    assert not other.serving


def test_the_port_is_erlangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERL_EPMD_PORT", raising=False)
    assert epmd.epmd_port() == 4369
    monkeypatch.setenv("ERL_EPMD_PORT", "5001")
    assert epmd.epmd_port() == 5001
    for text in ("", "0", "70000", "x", "-1"):
        monkeypatch.setenv("ERL_EPMD_PORT", text)
        with pytest.raises(EpmdError, match="ERL_EPMD_PORT"):
            epmd.epmd_port()
