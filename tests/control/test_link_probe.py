"""Links are measured by short exchanges over real sockets, between two real nodes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import gen_server
from bridge.term import Atom
from control.link_exchange import (
    TOKEN_BYTES,
    ExchangeFailed,
    Limits,
    answer,
    figures,
    listen,
    measure,
)
from control.link_probe import NAME, Book, LinkProbe, Pace, TcpTransport
from control.topology import Kind, Link
from tests.control.cluster_node import ClusterNode, cluster_node, connect
from tests.waiting import wait_until_async

TOKEN = bytes(range(TOKEN_BYTES))
QUICK = Limits(num_small=5, most_bytes=1 << 18, timeout_s=2.0)
HOST = "127.0.0.1"
LINK = Link(Kind.ETHERNET, 1e-3, 1e8)


@contextlib.contextmanager
def answering(token: bytes, limits: Limits) -> Iterator[tuple[tuple[str, int], list[str]]]:
    """A listener in a thread; the list gets what went wrong there."""
    listener, wrong = listen("127.0.0.1"), []
    address = ("127.0.0.1", int(listener.getsockname()[1]))

    def run() -> None:
        try:
            answer(listener, token, limits)
        except ExchangeFailed as exc:
            wrong.append(str(exc))

    thread = threading.Thread(target=run)
    thread.start()
    yield address, wrong
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_an_exchange_measures_a_link_and_leaves_no_listener() -> None:
    with answering(TOKEN, QUICK) as (address, wrong):
        latency_s, bytes_per_s = measure(address, TOKEN, QUICK)
    assert 0 < latency_s < 0.1
    assert 1e6 < bytes_per_s < 1e12
    assert not wrong
    with pytest.raises(ExchangeFailed, match="refused"):
        measure(address, TOKEN, QUICK)


def test_a_stranger_measures_nothing() -> None:
    with answering(TOKEN, QUICK) as (address, wrong), pytest.raises(ExchangeFailed):
        measure(address, bytes(TOKEN_BYTES), QUICK)
    assert wrong == ["wrong token"]


def test_one_that_takes_more_than_was_agreed_is_cut_off() -> None:
    greedy = Limits(num_small=1, most_bytes=1 << 22, total_bytes=1 << 23, long_s=9.0)
    frugal = Limits(total_bytes=1 << 17)
    with answering(TOKEN, frugal) as (address, _):
        latency_s, _ = measure(address, TOKEN, greedy)  # what came before counts
    assert latency_s > 0


def test_a_silent_end_costs_no_more_than_the_time_out() -> None:
    limits = Limits(timeout_s=0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = ("127.0.0.1", int(silent.getsockname()[1]))
        with pytest.raises(ExchangeFailed, match=r"timed out|too long"):
            measure(address, TOKEN, limits)
    with answering(TOKEN, limits) as (_, wrong):
        pass
    assert wrong == ["timed out"]


@pytest.mark.slow
@given(
    round_s=st.floats(1e-5, 1e-1),
    rate=st.floats(1e6, 1e9),
    noise=st.lists(st.floats(0, 1), min_size=5, max_size=5),
)
def test_figures_are_those_of_the_link_where_half_of_the_messages_are_late(
    round_s: float, rate: float, noise: list[float]
) -> None:
    small_s = [round_s] * 6 + [round_s + late for late in noise]
    large = [(size, round_s + size / rate) for size in (1 << 16, 1 << 20, 1 << 23)]
    latency_s, found = figures(small_s, large)
    assert latency_s == pytest.approx(round_s / 2)
    assert found == pytest.approx(rate, rel=1e-2) or found < rate  # below what can be told


def test_new_peers_come_first_then_those_that_are_due_longest() -> None:
    book, peers = Book(), ["c", "a", "b"]
    seen = []
    for now_s in range(3):
        peer = book.next_peer(peers, float(now_s), busy=now_s == 1)
        assert peer is not None
        seen.append(peer)
        book.due_s[peer] = now_s + 100.0
    assert seen == ["a", "b", "c"]
    book.links = {"a": LINK, "b": LINK}
    book.due_s["c"] = 25.0  # it failed: sooner again
    assert book.next_peer(peers, 24.0, busy=False) is None
    assert book.next_peer(peers, 27.0, busy=True) == "c"
    book.due_s["c"] = 200.0
    assert book.next_peer(peers, 100.0, busy=True) is None
    assert book.next_peer(peers, 101.0, busy=False) == "a"
    book.keep(["a", "c"])
    assert (sorted(book.due_s), sorted(book.links)) == (["a", "c"], ["a"])


def probe(
    node: ClusterNode,
    clock: list[float],
    hosts: tuple[str, ...] = (HOST,),
    inside: Link | None = None,
) -> LinkProbe:
    return LinkProbe(
        TcpTransport(QUICK),
        hosts=lambda: hosts,
        inside=lambda: inside,
        busy=lambda: False,
        now_s=lambda: clock[0],
        random=lambda: 0.5,
        pace=Pace(every_s=0.02, new_s=0.02, again_s=100.0),
        limits=QUICK,
    )


async def links_of(node: ClusterNode, request: str = "links") -> set[tuple[str, str]]:
    answer = await node.call(NAME, Atom(request))
    return {(str(link["from"]), str(link["to"])) for link in answer if "to" in link}


def test_nodes_measure_each_other_and_every_node_tells_all_links() -> None:
    async def run() -> None:
        async with cluster_node("here") as here, cluster_node("there") as there:
            await connect(here, there)
            clock = [0.0]
            bolt = Link(Kind.NVLINK, 3e-6, 1e11)
            probes = {node.name: probe(node, clock) for node in (here, there)}
            probes[there.name] = probe(there, clock, inside=bolt)
            for node in (here, there):
                await gen_server.start(node.node, probes[node.name], name=NAME)
            mine = probes[here.name].book
            await wait_until_async(lambda: all(p.book.links for p in probes.values()), 10.0)
            both = {(here.name, there.name), (there.name, here.name), (there.name,) * 2}
            assert await links_of(here) == {(here.name, there.name)}
            assert await links_of(here, "topology") == both
            assert await links_of(there, "topology") == both
            (link,) = mine.links.values()
            assert link.kind == Kind.LOOPBACK
            assert 0 < link.latency_s < 0.1
            mine.links[there.name] = LINK  # it is measured again when it is time
            clock[0] = 101.0
            await wait_until_async(lambda: mine.links[there.name] != LINK, 10.0)
            here.node.disconnect(there.name)
            await wait_until_async(lambda: not mine.links, 10.0)
            clock[0] = 110.0
            assert await links_of(here, "topology") == set()

    asyncio.run(run())


def test_a_machine_that_tells_nothing_stands_without_links() -> None:
    async def run() -> None:
        async with cluster_node("here") as here, cluster_node("there") as there:
            await connect(here, there)
            mine = probe(here, [0.0])
            await gen_server.start(here.node, mine, name=NAME)
            await wait_until_async(lambda: there.name in mine.book.due_s, 10.0)
            answer = await here.call(NAME, Atom("topology"))
            assert sorted(str(one["from"]) for one in answer) == [here.name, there.name]
            assert not any("to" in one for one in answer)

    asyncio.run(run())


def test_one_exchange_at_a_time_and_at_our_own_addresses_alone() -> None:
    async def run() -> None:
        async with cluster_node("here") as here:
            await gen_server.start(here.node, probe(here, [0.0]), name=NAME)
            request = (Atom("open"), TOKEN, HOST)
            first = await here.call(NAME, request)
            assert await here.call(NAME, request) == (Atom("error"), Atom("busy"))
            address = (HOST, int(first[1]))
            await asyncio.to_thread(measure, address, TOKEN, QUICK)
            elsewhere = (Atom("open"), TOKEN, "0.0.0.0")

            async def refused() -> bool:
                return "no address" in str(await here.call(NAME, elsewhere))

            while not await refused():  # until the first exchange has ended
                pass

    asyncio.run(run())
