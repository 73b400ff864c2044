"""Discovery on real connections: static peers, nodes of one EPMD, and who is not joined."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from bridge.epmd import Epmd
from bridge.term import Atom
from control.discovery.epmd_strategy import EpmdStrategy
from tests.control.cluster_node import ClusterNode, cluster_node
from tests.control.test_membership import run, until_states

pytestmark = pytest.mark.slow


async def until_seen(node: ClusterNode, name: str, state: str) -> dict[str, Any]:
    while True:
        for row in await node.call("discovery", Atom("seen")):
            if str(row["node"]) == name and str(row["state"]) == state:
                found: dict[str, Any] = row
                return found
        await asyncio.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_static_peer_is_joined_and_found_again_after_it_was_away() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        async with cluster_node("b") as b:
            await a.discover([a.static(str(b.address))])
            await until_states(a, {a.name: "up", b.name: "up"})
            await until_seen(a, b.name, "joined")
            a.node.disconnect(b.name)
            await until_states(a, {a.name: "up", b.name: "down"})
            await until_states(a, {a.name: "up", b.name: "up"})
        row = await until_seen(a, b.name, "trying")
        assert row["source"] == "static"

    run(body)


def test_a_static_peer_that_comes_later_is_joined() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        port = free_port()
        a = await stack.enter_async_context(cluster_node("a"))
        await a.discover([a.static("127.0.0.1", epmd_port=port)])
        row = await until_seen(a, "127.0.0.1", "refused")
        assert "no EPMD" in row["why"]
        b = await stack.enter_async_context(cluster_node("b", epmd=Epmd(tcp_port=port)))
        await until_states(a, {a.name: "up", b.name: "up"})

    run(body)


def test_nodes_that_know_one_in_common_find_each_other() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        nodes = [await stack.enter_async_context(cluster_node(n)) for n in ("a", "b", "c")]
        a, b, c = nodes
        await a.discover([a.static(str(b.address))])
        await c.discover([c.static(str(b.address))])
        for node in nodes:
            await until_states(node, {one.name: "up" for one in nodes})
        await until_seen(a, c.name, "joined")

    run(body)


def test_a_peer_with_another_cookie_is_named_and_not_joined() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b", cookie="OTHER"))
        await a.discover([a.static(str(b.address), "no.such.name.invalid")])
        row = await until_seen(a, str(b.address), "refused")
        assert "another secret" in row["why"]
        row = await until_seen(a, "no.such.name.invalid", "refused")
        assert "is not known" in row["why"]
        assert await a.states() == {a.name: "up"}

    run(body)


def test_a_peer_of_another_cluster_is_named_and_not_joined() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b", cluster="home"))
        await a.discover([a.static(str(b.address))])
        row = await until_seen(a, b.name, "refused")
        assert "cluster 'home'" in row["why"]
        await until_states(a, {a.name: "up", b.name: "refused"})

    run(body)


def test_nodes_of_one_epmd_join_and_strangers_among_them_do_not() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        port = free_port()

        async def node(name: str, cookie: str = "SECRET") -> ClusterNode:
            made = await stack.enter_async_context(
                cluster_node(name, cookie=cookie, epmd=Epmd(tcp_port=port))
            )
            await made.discover([EpmdStrategy(made.identity, epmd_port=port)])
            return made

        a, b, stranger = await node("a"), await node("b"), await node("s", "OTHER")
        await until_states(a, {a.name: "up", b.name: "up"})
        row = await until_seen(a, f"s (port {stranger.address.port})", "refused")
        assert "another secret" in row["why"]
        assert await stranger.states() == {stranger.name: "up"}
        # a host alone asks its EPMD
        d = await stack.enter_async_context(cluster_node("d"))
        await d.discover([d.static("127.0.0.1", epmd_port=port)])
        await until_states(d, dict.fromkeys((a.name, b.name, d.name), "up"))

    run(body)
