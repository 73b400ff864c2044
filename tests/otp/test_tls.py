"""Distribution over TLS: our nodes with each other, and with a stock node that has ``ssl``."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.gen_server import GenServer
from bridge.net_kernel import MAX_HANDSHAKES
from bridge.node import Node
from bridge.term import Atom, Term
from bridge.tls import TlsFiles
from ops.config import Tls
from ops.home import open_home
from ops.tls_files import prepare, ssl_conf
from tests.otp.cluster import COOKIE, WAIT_S, each_otp, stock_node
from tests.otp.stock import Erl, Otp, free_tcp_port
from tests.waiting import wait_until_async

pytestmark = pytest.mark.slow

A = Atom
PY, ERL = A("py@127.0.0.1"), A("erl@127.0.0.1")
HOST = "127.0.0.1"
BIG = bytes(range(256)) * 1000  # fragments


class Echo(GenServer):
    async def handle_call(self, request: Term, from_: Term) -> Term:
        return request


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[TlsFiles, Path]:
    """What a node makes for itself, and the option file for stock nodes."""
    home = open_home(tmp_path_factory.mktemp("home"))
    files = prepare(Tls(), home, HOST)
    assert files is not None
    return files, ssl_conf(home)


@contextlib.asynccontextmanager
async def tls_node(files: TlsFiles, epmd: Epmd | None = None) -> AsyncIterator[Node]:
    node = Node(PY, COOKIE, tls=files.contexts())
    await node.start(listen=(HOST, 0), epmd=epmd)
    await gen_server.start(node, Echo(), name="echo")
    try:
        yield node
    finally:
        await node.stop()


def address_of(node: Node) -> tuple[str, int]:
    assert node.address is not None
    return node.address


async def test_only_peers_with_a_certificate_of_the_cluster_get_in(
    keys: tuple[TlsFiles, Path], tmp_path: Path
) -> None:
    files, _ = keys
    stranger = prepare(Tls(), open_home(tmp_path), HOST)
    assert stranger is not None
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts our server, has nothing to show
    bare.check_hostname = False
    bare.load_verify_locations(files.ca)
    peers = {
        "good@127.0.0.1": files.contexts(),
        "plain@127.0.0.1": None,
        "bare@127.0.0.1": (files.contexts()[0], bare),
        "stranger@127.0.0.1": stranger.contexts(),
    }
    async with tls_node(files) as node:
        good = {}
        for name, tls in peers.items():
            other = Node(name, COOKIE, tls=tls)
            await other.start(listen=None, epmd=None)
            good[name] = await other.connect(PY, address=node.address, timeout_s=WAIT_S)
            if good[name]:
                with other.open_process() as me:
                    assert await gen_server.call(me, ("echo", PY), BIG) == BIG
            await other.stop()
    assert good == {name: name == "good@127.0.0.1" for name in peers}


async def test_a_plain_node_refuses_a_tls_peer(keys: tuple[TlsFiles, Path]) -> None:
    plain, secure = Node(PY, COOKIE), Node("tls@127.0.0.1", COOKIE, tls=keys[0].contexts())
    await plain.start(listen=(HOST, 0), epmd=None)
    await secure.start(listen=None, epmd=None)
    try:
        assert not await secure.connect(PY, address=plain.address, timeout_s=WAIT_S)
        assert plain.nodes() == []
    finally:
        await secure.stop()
        await plain.stop()


async def test_connections_that_never_begin_tls_are_bounded(keys: tuple[TlsFiles, Path]) -> None:
    async with tls_node(keys[0]) as node:
        silent = [
            await asyncio.open_connection(*address_of(node)) for _ in range(MAX_HANDSHAKES + 20)
        ]
        closed = 0
        for reader, _ in silent[:20]:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(1), WAIT_S) == b""
            closed += 1
        assert closed == 20
        for _, writer in silent:
            writer.close()
        # They leave nothing behind that would keep honest peers out.
        other = Node("good@127.0.0.1", COOKIE, tls=keys[0].contexts())
        await other.start(listen=None, epmd=None)
        assert await other.connect(PY, address=node.address, timeout_s=WAIT_S)
        await other.stop()
        await wait_until_async(lambda: node.nodes() == [], WAIT_S)


@pytest.mark.erlang
@each_otp()
async def test_a_stock_node_both_ways(otp: Otp, keys: tuple[TlsFiles, Path]) -> None:
    async with Erl(otp) as probe:
        if not isinstance(await probe.eval("code:lib_dir(ssl)"), list):
            pytest.skip(f"{otp} has no ssl")
    files, conf = keys
    epmd = Epmd(HOST, free_tcp_port())
    async with tls_node(files, epmd) as node:
        tls = ("-proto_dist", "inet_tls", "-ssl_dist_optfile", str(conf))
        async with stock_node(otp, epmd.tcp_port, *tls) as erl:
            assert await erl.eval("net_adm:ping(N)", N=PY) == A("pong")
            assert node.nodes() == [ERL]
            assert await erl.eval("gen_server:call({echo, N}, B)", N=PY, B=BIG) == BIG
            assert node.disconnect(ERL)
            assert await node.connect(ERL, timeout_s=WAIT_S)
            assert await erl.eval("net_adm:ping(N)") == A("pong")
            with node.open_process() as me:
                server = (A("net_kernel"), ERL)
                answer = await gen_server.call(me, server, (A("is_auth"), PY))
            assert answer == A("yes")
        quick = ("-kernel", "net_setuptime", "1")
        async with stock_node(otp, epmd.tcp_port, *quick, name="plain@127.0.0.1") as plain:
            assert await plain.eval("net_adm:ping(N)", N=PY) == A("pang")
            assert not await node.connect("plain@127.0.0.1", timeout_s=WAIT_S)
