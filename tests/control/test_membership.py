"""Membership on real connections: who joins, who is refused, who is lost, and who hears of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from bridge import gen_server
from bridge.process_errors import ReceiveTimeout
from bridge.term import Atom, Pid
from control import membership_rule as rule
from control.beats import GIVE_UP_S, BeatThread, last_sign_s
from control.events import publish, subscribe
from tests.control.cluster_node import GIB, MACHINE, ClusterNode, cluster_node, connect
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def run(body: Callable[[contextlib.AsyncExitStack], Awaitable[None]]) -> None:
    async def with_stack() -> None:
        async with asyncio.timeout(30), contextlib.AsyncExitStack() as stack:
            await body(stack)

    asyncio.run(with_stack())


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Return once ``check`` is true; ``run`` limits the time."""
    while True:
        if await check():
            return
        await asyncio.sleep(0.02)


async def until_states(node: ClusterNode, wanted: dict[str, str]) -> None:
    async def as_wanted() -> bool:
        return await node.states() == wanted

    await until(as_wanted)


def test_two_nodes_join_and_tell_each_other_what_they_have() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b"))
        b.machine = replace(MACHINE, cores=7)
        me = await stack.enter_async_context(a.subscribed())
        await connect(a, b)
        assert await me.receive(timeout_s=5) == ("node_up", b.name)
        await until_states(a, {a.name: "up", b.name: "up"})
        await until_states(b, {a.name: "up", b.name: "up"})

        async def told_of_the_change() -> bool:  # it came after the start
            return bool((await a.rows())[b.name]["cores"] == 7)

        await until(told_of_the_change)
        row = (await a.rows())[b.name]
        assert row["memory"]["total_bytes"] == 8 * GIB
        assert (row["version"], row["note"], row["roles"]) == (b"1", "", ["compute"])
        assert [str(d["kind"]) for d in row["devices"]] == ["cpu"]

    run(body)


def test_a_node_that_leaves_is_down_at_once_and_stays_listed() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        me = await stack.enter_async_context(a.subscribed())
        async with cluster_node("b") as b:
            await connect(b, a)
            assert await me.receive(timeout_s=5) == ("node_up", b.name)
        assert await me.receive(timeout_s=5) == ("node_down", "b@127.0.0.1")
        row = (await a.rows())["b@127.0.0.1"]
        assert (str(row["state"]), row["cores"]) == ("down", 4)
        async with cluster_node("b") as b:
            await connect(b, a)
            assert await me.receive(timeout_s=5) == ("node_up", b.name)

    run(body)


def test_a_silent_node_is_down_and_its_connection_is_cut() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b"))
        me = await stack.enter_async_context(a.subscribed())
        await connect(a, b)
        assert await me.receive(timeout_s=5) == ("node_up", b.name)
        assert b.membership is not None
        await gen_server.sys_call(me, b.membership, Atom("suspend"))  # across the link
        assert await me.receive(timeout_s=5) == ("node_down", b.name)
        assert b.name not in a.node.nodes()
        assert "silent for" in str((await a.rows())[b.name]["why"])

    run(body)


def test_a_node_whose_membership_is_late_stays_up_by_its_thread() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        limits = rule.Limits()
        a = await stack.enter_async_context(cluster_node("a", limits=limits))
        b = await stack.enter_async_context(cluster_node("b", limits=limits))
        me = await stack.enter_async_context(a.subscribed())
        await connect(a, b)
        assert await me.receive(timeout_s=5) == ("node_up", b.name)
        assert b.membership is not None
        await gen_server.sys_call(me, b.membership, Atom("suspend"))
        with pytest.raises(ReceiveTimeout):  # twice the silence that is a machine's end
            await me.receive(timeout_s=2 * limits.silence_s)
        assert (await a.states())[b.name] == "up"
        await gen_server.sys_call(me, b.membership, Atom("resume"))

    run(body)


def test_another_cluster_with_our_cookie_is_refused_and_named() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b", cluster="home"))
        await connect(a, b)
        await until_states(a, {a.name: "up", b.name: "refused"})
        await until_states(b, {a.name: "refused", b.name: "up"})
        assert "of the cluster 'home'" in str((await a.rows())[b.name]["why"])

        async def both_alone() -> bool:
            return not a.node.nodes() and not b.node.nodes()

        await until(both_alone)

    run(body)


def test_another_version_joins_and_is_named() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b", version="2"))
        await connect(a, b)
        await until_states(a, {a.name: "up", b.name: "up"})
        note = (await a.rows())[b.name]["note"]
        assert note == "it runs version 2, this node 1: install the same on both"

    run(body)


def test_a_plain_erlang_node_is_no_machine_and_is_left_alone() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b", with_membership=False))
        c = await stack.enter_async_context(cluster_node("c"))
        await connect(a, b)
        me = await stack.enter_async_context(a.subscribed())
        await connect(a, c)
        assert await me.receive(timeout_s=5) == ("node_up", c.name)
        assert c.membership is not None
        await gen_server.sys_call(me, c.membership, Atom("suspend"))
        assert await me.receive(timeout_s=5) == ("node_down", c.name)  # so b was silent as long
        assert a.node.nodes() == [b.name]
        assert b.name not in await a.states()

    run(body)


def test_an_election_that_was_restarted_is_told_again_who_is_up() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b"))
        await connect(a, b)
        await until_states(a, {a.name: "up", b.name: "up"})
        for _ in range(2):
            with a.node.open_process(label="election") as me:
                a.node.register("election", me.pid)
                assert await me.receive(timeout_s=5) == ("node_up", b.name)

    run(body)


def test_events_reach_every_node_with_those_that_happened_before_it_came() -> None:
    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b"))
        feed = subscribe(b.node)
        coming = asyncio.ensure_future(anext(feed))
        await b.call("events", (Atom("recent"), 1))  # after the subscription
        with a.node.open_process(label="publisher") as me:
            publish(me, "early", {Atom("n"): 1})
            await connect(a, b)
            publish(me, "late", {Atom("n"): 2})
        found: dict[str, dict[Any, Any]] = {}
        while {"early", "late"} - set(found):
            kind, data = await coming
            found[kind] = data
            coming = asyncio.ensure_future(anext(feed))
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await feed.aclose()  # type: ignore[attr-defined]  # it is a generator
        assert found["node_up"]["node"] == a.name
        assert [found[kind]["origin"] for kind in ("early", "late")] == [a.name, a.name]
        recent = await b.call("events", (Atom("recent"), 10))
        assert [(str(kind), data["n"]) for kind, data in recent] == [("early", 1), ("late", 2)]

    run(body)


def test_the_thread_beats_while_the_event_loop_cannot() -> None:
    threads = {
        name: BeatThread(name, cookie, host="127.0.0.1", incarnation=1)
        for name, cookie in (("a", "SECRET"), ("b", "SECRET"), ("x", "OTHER"))
    }
    try:
        for thread in threads.values():
            thread.start()
        for name in ("a", "x"):  # from now on their membership does not come round
            threads[name].set_peers({"b": ("127.0.0.1", threads["b"].port)})
        wait_until(lambda: threads["b"].heard_s("a") > 0, 5.0, "a beat of the thread")
        assert threads["b"].heard_s("x") < 0
        assert threads["a"].heard_s("b") < 0
    finally:
        for thread in threads.values():
            thread.stop()


def test_a_thread_stands_in_for_a_while_alone() -> None:
    assert last_sign_s(10.0, float("-inf")) == 10.0
    assert last_sign_s(10.0, 12.0) == 12.0
    assert last_sign_s(10.0, 99.0) == 10.0 + GIVE_UP_S


def test_a_beat_of_somebody_unknown_is_answered_with_a_hello() -> None:
    """What a restarted membership does when its peer has not noticed."""

    async def body(stack: contextlib.AsyncExitStack) -> None:
        a = await stack.enter_async_context(cluster_node("a"))
        b = await stack.enter_async_context(cluster_node("b", with_membership=False))
        await connect(b, a)
        with b.node.open_process(label="membership") as me:
            b.node.register("membership", me.pid)
            me.send(("membership", a.name), (Atom("beat"), me.pid, rule.beat_term(rule.Beat(9, 0))))
            match await me.receive(lambda m: m if m[0] == "hello" else None, timeout_s=5):
                case ("hello", Pid() as pid, dict()):
                    assert pid.node == a.name

    run(body)
