"""A Python node and stock nodes that find each other through an EPMD of their own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from bridge.epmd import Epmd
from bridge.node import Node
from bridge.term import Term
from tests.otp.stock import Erl, Otp, free_tcp_port, installations

COOKIE = "a shared secret"
ALL = installations()
NEWEST = ALL[:1]
WAIT_S = 10.0


def each_otp(otps: list[Otp] = ALL) -> pytest.MarkDecorator:
    """Run a test once for each OTP there is."""
    return pytest.mark.parametrize("otp", otps, ids=str)


@contextlib.asynccontextmanager
async def python_node(
    name: str = "py@127.0.0.1", *, hidden: bool = False, epmd_port: int | None = None
) -> AsyncIterator[tuple[Node, int]]:
    """A started node, and the port of the EPMD that knows it."""
    epmd = Epmd("127.0.0.1", epmd_port or free_tcp_port())
    node = Node(name, COOKIE, hidden=hidden)
    await node.start(listen=("127.0.0.1", 0), epmd=epmd)
    try:
        yield node, epmd.tcp_port
    finally:
        await node.stop()


def stock_node(
    otp: Otp, epmd_port: int, *args: str, name: str = "erl@127.0.0.1", cookie: str = COOKIE
) -> Erl:
    """A stock node, not connected to anyone yet."""
    quiet = ("-kernel", "logger_level", "critical")
    return Erl(otp, ("-name", name, "-setcookie", cookie, *quiet, *args), epmd_port)


async def message(erl: Erl) -> Term:
    """The next message of the process that evaluates."""
    return await erl.eval("(fun() -> receive Any -> Any after 10000 -> none end end)()")
