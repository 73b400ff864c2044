"""Links are measured by short exchanges over real sockets, between two real nodes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import gen_server
from bridge.node import Node
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
from tests.waiting import wait_until_async

TOKEN = bytes(range(TOKEN_BYTES))
QUICK = Limits(num_small=5, most_bytes=1 << 18, timeout_s=2.0)
HERE, THERE = "here@127.0.0.1", "there@127.0.0.1"
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


def test_new_peers_come_first_then_those_measured_longest_ago() -> None:
    book, peers = Book(), ["c", "a", "b"]
    seen = []
    for now_s in range(3):
        peer = book.next_peer(peers, float(now_s), 100.0, busy=now_s == 1)
        assert peer is not None
        seen.append(peer)
        book.tried_s[peer] = float(now_s)
    assert seen == ["a", "b", "c"]
    book.links = {"a": LINK, "b": LINK}
    assert book.next_peer(peers, 24.0, 100.0, busy=False) is None
    assert book.next_peer(peers, 27.0, 100.0, busy=False) == "c"  # it failed: sooner again
    assert book.next_peer(peers, 27.0, 100.0, busy=True) is None
    assert book.next_peer(["a", "b"], 100.0, 100.0, busy=False) == "a"
    assert "c" not in book.tried_s


@contextlib.asynccontextmanager
async def started(name: str) -> AsyncIterator[Node]:
    node = Node(name, "cookie")
    await node.start(listen=("127.0.0.1", 0), epmd=None)
    try:
        yield node
    finally:
        await node.stop()


def probe(node: Node, peers: list[str], found: dict[str, Link], clock: list[float]) -> LinkProbe:
    return LinkProbe(
        TcpTransport(node, lambda peer: peer.partition("@")[2], QUICK),
        "127.0.0.1",
        peers=lambda: peers,
        kind_of=lambda peer: Kind.ETHERNET,
        found=found.__setitem__,
        busy=lambda: False,
        now_s=lambda: clock[0],
        random=lambda: 0.5,
        pace=Pace(every_s=0.02, again_s=100.0),
        limits=QUICK,
    )


def test_nodes_measure_each_other_once_and_again_when_it_is_time() -> None:
    async def run() -> None:
        async with started(HERE) as here, started(THERE) as there:
            assert await here.connect(THERE, address=there.address, timeout_s=5.0)
            found: dict[str, Link] = {}
            clock = [0.0]
            gone = "gone@127.0.0.1"
            await gen_server.start(there, probe(there, [], {}, clock), name=NAME)
            mine = probe(here, [THERE, gone], found, clock)
            await gen_server.start(here, mine, name=NAME)
            await wait_until_async(lambda: THERE in found and gone in mine.book.tried_s, 10.0)
            links = await gen_server.node_call(here, Atom(NAME), Atom("links"))
            assert isinstance(links, list)
            assert [link["to"] for link in links] == [THERE]
            assert links[0]["latency_s"] == found[THERE].latency_s
            found.clear()
            clock[0] = 101.0
            await wait_until_async(lambda: THERE in found, 10.0)
            assert gone not in found

    asyncio.run(run())


def test_a_second_exchange_at_the_same_time_is_refused() -> None:
    async def run() -> None:
        async with started(HERE) as here:
            await gen_server.start(here, probe(here, [], {}, [0.0]), name=NAME)
            request = (Atom("open"), TOKEN)
            first = await gen_server.node_call(here, Atom(NAME), request)
            second = await gen_server.node_call(here, Atom(NAME), request)
            assert isinstance(first, tuple)
            assert second == (Atom("error"), Atom("busy"))
            address = ("127.0.0.1", int(first[1]))
            await asyncio.to_thread(measure, address, TOKEN, QUICK)

    asyncio.run(run())
