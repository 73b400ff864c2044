"""API keys between two real nodes: made on one, valid on both, revoked on the first."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from bridge import gen_server
from bridge.term import Atom
from ops.client import Target, connect
from ops.home import Home
from tests.cluster.live_node import LiveNode, free_tcp_port
from tests.ops.ctl_harness import Result, run_ctl
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

CONFIG = "network: {discovery: epmd}\nengine: {spare_ports: 0}\nhttp: {tls: true}\n"
COOKIE = "SECRETOFTHETEST"
WAIT_S = 20.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LiveNode]]:
    folder, epmd_port = tmp_path_factory.mktemp("keys"), free_tcp_port()
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    made = [LiveNode(folder / name, f"{name}@127.0.0.1", epmd_port) for name in ("one", "two")]
    for node in made:
        node.home.mkdir(mode=0o700)
        (node.home / "cookie").touch(mode=0o600)
        (node.home / "cookie").write_text(COOKIE)
    try:
        with ThreadPoolExecutor() as pool:
            args = ("--config", str(config), "--no-model")
            list(pool.map(lambda node: node.start(*args), made))
        yield made
    finally:
        for node in made:
            node.stop()


def ctl(node: LiveNode, *args: str) -> Result:
    found = run_ctl(*args, "--home", node.home)
    assert found.status == 0, found.err
    return found


@contextlib.contextmanager
def client(node: LiveNode, key: str = "") -> Iterator[httpx.Client]:
    """Trusts the authority of the node's home alone."""
    trusted = ssl.create_default_context(cafile=str(node.home / "keys" / "dist_ca.pem"))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=node.url, verify=trusted, headers=headers, timeout=10) as made:
        yield made


def status(node: LiveNode, key: str = "") -> int:
    with client(node, key) as http:
        return http.get("/v1/models").status_code


def joined(node: LiveNode) -> bool:
    rows: list[dict[str, Any]] = ctl(node, "nodes", "--json").json
    return [row["state"] for row in rows] == ["up", "up"]


def test_a_key_is_the_clusters_until_it_is_revoked(nodes: list[LiveNode]) -> None:
    one, two = nodes
    assert one.url.startswith("https://127.0.0.1:")
    for node in nodes:
        wait_until(lambda node=node: joined(node), WAIT_S, "one cluster")  # type: ignore[misc]
    assert [status(node) for node in nodes] == [200, 200]
    kept = ctl(one, "key", "create", "--name", "kept", "--scope", "admin").out.strip()
    lost = ctl(two, "key", "create", "--name", "lost").out.strip()  # by whoever does not lead too
    for key in (kept, lost):
        for node in nodes:
            wait_until(lambda node=node, key=key: status(node, key) == 200, WAIT_S, "valid")  # type: ignore[misc]
    assert [status(node) for node in nodes] == [401, 401]
    ctl(one, "key", "revoke", lost.split("-")[1])
    wait_until(lambda: status(two, lost) == 401, WAIT_S, "revoked on the other node")
    assert [status(node, lost) for node in nodes] == [401, 401]
    with client(two, kept) as http:  # over HTTP too
        made = http.post("/cluster/keys", json={"name": "by http"}).json()
    assert made["id"] in ctl(one, "key", "list").out
    for key in (kept, lost, made["key"]):
        assert not written(nodes, key)
        shown = asyncio.run(states(one))
        assert key.split("-")[1] in shown or key == lost
        assert key not in shown
        assert hashlib.sha256(key.encode()).hexdigest() not in shown


async def states(node: LiveNode) -> str:
    """What ``sys:get_state`` and ``sys:get_status`` tell of every part that has to do with keys."""
    shown = []
    async with connect(Target(Home(node.home))) as found:
        with found.node.open_process() as me:
            for name in ("scheduler", "gateway", "cluster", "events", "surface_sup"):
                for what in ("get_state", "get_status"):
                    answer = await gen_server.sys_call(me, (name, found.name), Atom(what))
                    shown.append(repr(answer))
    return "\n".join(shown)


def written(nodes: list[LiveNode], key: str) -> list[Path]:
    """Files and output that hold a key, or its secret half."""
    secret = key.split("-", 2)[2].encode()
    files = [path for node in nodes for path in node.home.rglob("*") if path.is_file()]
    found = [path for path in files if secret in path.read_bytes()]
    return found + [node.home for node in nodes if secret.decode() in "\n".join(node.lines)]
