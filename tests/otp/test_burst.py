"""A burst of messages from a stock node: all arrive, in order, in bounded memory, ticks go on."""

from __future__ import annotations

import contextlib
import time

import psutil
import pytest

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Term
from tests.otp.cluster import COOKIE, NEWEST, each_otp, python_node, stock_node
from tests.otp.stock import Otp, free_tcp_port
from tests.waiting import wait_until_async

pytestmark = [pytest.mark.slow, pytest.mark.erlang]

SEND = """
lists:foreach(fun(I) -> {sink, N} ! {msg, I, <<"a piece of generated text">>} end,
  lists:seq(1, Count))
"""


class Sink(GenServer):
    """Counts; every message costs it ``cost_s`` of pure computing."""

    def __init__(self, cost_s: float = 0.0) -> None:
        self.cost_s = cost_s
        self.numbers: list[int] = []

    async def init(self, me: Process) -> None:
        self._me = me

    async def handle_info(self, message: Term) -> None:
        self.numbers.append(message[1])
        end_s = time.perf_counter() + self.cost_s
        while time.perf_counter() < end_s:
            pass


@each_otp(NEWEST)
async def test_a_burst_arrives_in_order_and_in_bounded_memory(otp: Otp) -> None:
    count = 30_000
    async with python_node() as (node, epmd_port), stock_node(otp, epmd_port) as erl:
        sink = Sink()
        await gen_server.start(node, sink, name="sink")
        before = psutil.Process().memory_info().rss
        await erl.eval(SEND, N=Atom(node.name), Count=count)
        await wait_until_async(lambda: len(sink.numbers) >= count, 30)
        assert sink.numbers == list(range(1, count + 1))
        assert psutil.Process().memory_info().rss - before < 60 << 20


@each_otp(NEWEST)
async def test_a_server_that_lags_behind_does_not_cost_its_node_the_link(otp: Otp) -> None:
    """The peer drops a link that is silent for a second; the backlog takes longer."""
    count, cost_s = 12_000, 0.0002
    ticks = ("-kernel", "net_ticktime", "1")
    async with contextlib.AsyncExitStack() as stack:
        epmd = Epmd("127.0.0.1", free_tcp_port())
        node = Node("py@127.0.0.1", COOKIE, net_ticktime_s=1)
        stack.push_async_callback(node.stop)
        await node.start(listen=("127.0.0.1", 0), epmd=epmd)
        erl = await stack.enter_async_context(stock_node(otp, epmd.tcp_port, *ticks))
        sink = Sink(cost_s)
        await gen_server.start(node, sink, name="sink")
        assert await erl.eval("net_adm:ping(N)", N=Atom(node.name)) == Atom("pong")
        await erl.eval("erlang:monitor_node(N, true)")
        await erl.eval(SEND, Count=count)
        await wait_until_async(lambda: len(sink.numbers) >= count, 30)
        assert sink.numbers == list(range(1, count + 1))
        assert await erl.eval("receive Lost -> Lost after 0 -> up end") == Atom("up")
