"""Distribution over TLS: our nodes with each other, and with a stock node that has ``ssl``."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from bridge.epmd import Epmd
from bridge.node import Node
from bridge.term import Atom
from tests.otp.cluster import COOKIE, WAIT_S, each_otp, stock_node
from tests.otp.stock import Erl, Otp, free_tcp_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates"),
]

A = Atom
PY, ERL = A("py@127.0.0.1"), A("erl@127.0.0.1")

CERTIFICATES = """
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca
openssl req -newkey rsa:2048 -nodes -keyout key.pem -out request.pem -subj /CN=node
openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -days 2 \
  -extfile extensions
"""
EXTENSIONS = "subjectAltName=IP:127.0.0.1,DNS:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "extensions").write_text(EXTENSIONS)
    subprocess.run(
        ["sh", "-ec", CERTIFICATES], cwd=folder, check=True, capture_output=True, timeout=60
    )
    sides = (("server", ",{fail_if_no_peer_cert,true}"), ("client", ""))
    (folder / "ssl.conf").write_text(
        "["
        + ",".join(
            f'{{{side},[{{certfile,"{folder}/cert.pem"}},{{keyfile,"{folder}/key.pem"}},'
            f'{{cacertfile,"{folder}/ca.pem"}},{{verify,verify_peer}}{more}]}}'
            for side, more in sides
        )
        + "]."
    )
    return folder


def contexts(keys: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=keys / "ca.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=keys / "ca.pem")
    for context in (server, client):
        context.load_cert_chain(keys / "cert.pem", keys / "key.pem")
    return server, client


async def test_two_of_ours_and_a_peer_without_tls(keys: Path) -> None:
    one = Node(PY, COOKIE, tls=contexts(keys))
    two = Node("two@127.0.0.1", COOKIE, tls=contexts(keys))
    plain = Node("plain@127.0.0.1", COOKIE)
    try:
        await one.start(listen=("127.0.0.1", 0), epmd=None)
        for node, works in ((two, True), (plain, False)):
            await node.start(listen=None, epmd=None)
            assert await node.connect(PY, address=one.address, timeout_s=WAIT_S) is works
        assert one.nodes() == [two.name]
    finally:
        for node in (one, two, plain):
            await node.stop()


@pytest.mark.erlang
@each_otp()
async def test_a_stock_node_both_ways(otp: Otp, keys: Path) -> None:
    async with Erl(otp) as probe:
        if not isinstance(await probe.eval("code:lib_dir(ssl)"), list):
            pytest.skip(f"{otp} has no ssl")
    epmd = Epmd("127.0.0.1", free_tcp_port())
    node = Node(PY, COOKIE, tls=contexts(keys))
    await node.start(listen=("127.0.0.1", 0), epmd=epmd)
    try:
        tls = ("-proto_dist", "inet_tls", "-ssl_dist_optfile", str(keys / "ssl.conf"))
        async with stock_node(otp, epmd.tcp_port, *tls) as erl:
            assert await erl.eval("net_adm:ping(N)", N=PY) == A("pong")
            assert node.nodes() == [ERL]
            assert node.disconnect(ERL)
            assert await node.connect(ERL, timeout_s=WAIT_S)
            assert await erl.eval("net_adm:ping(N)") == A("pong")
    finally:
        await node.stop()
