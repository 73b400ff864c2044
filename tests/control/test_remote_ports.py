"""Ports on lease to another machine: reached by it, kept while it is away, given to the newer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid
from bridge.text import text_of
from control.os_process import OsIdentity
from control.rank import Rank, RankLimits
from control.rank_lease import Want
from tests.cluster.live_node import free_tcp_port
from tests.control.test_ports import broker

pytestmark = pytest.mark.slow
A = Atom
CONTROL = "control@127.0.0.1"
PORTS = (A("ports"), A(CONTROL))


@asynccontextmanager
async def other_machine(epmd_port: int) -> AsyncIterator[tuple[Node, Process]]:
    """A node without ports, and a process there."""
    node = Node("other@127.0.0.1", "SECRETCOOKIE")
    await node.start(listen=("127.0.0.1", 0), epmd=Epmd(tcp_port=epmd_port))
    try:
        with node.open_process(label="other") as me:
            yield node, me
    finally:
        await node.stop()


async def lease(
    me: Process,
    holder: Pid,
    *,
    rank: int = 0,
    layout: str = "",
    placement: int = 0,
    fresh: bool = False,
) -> Any:
    options = {
        A("holder"): holder,
        A("layout"): layout,
        A("placement"): placement,
        A("fresh"): fresh,
    }
    dest = A("ports") if me.node.name == CONTROL else PORTS
    return await gen_server.call(me, dest, (A("lease"), "i", rank, options), timeout_s=30)


def identity_of(leased: Any) -> OsIdentity:
    assert leased[0] == "ok", leased
    identity = OsIdentity.of(leased[3])
    assert identity is not None
    return identity


async def until_unheld(me: Process) -> None:
    async def holders() -> list[Any]:
        return [row["holder"] for row in await gen_server.call(me, A("ports"), A("ports"))]

    async with asyncio.timeout(5):
        while await holders() != ["undefined"]:  # noqa: ASYNC110  # nobody tells of it
            await asyncio.sleep(0.01)


def test_a_port_is_reached_from_afar_and_kept_while_its_holder_is_away(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_tcp_port()
        async with (
            broker(tmp_path, epmd_port=port) as (_, here),
            other_machine(port) as (other, me),
        ):
            leased = await lease(me, me.pid, layout="x")
            first = identity_of(leased)
            assert str(leased[2].node) in other.nodes(hidden=True)  # it does not listen itself
            assert await gen_server.call(me, leased[2], A("facts")) == {}

            other.disconnect(CONTROL)
            await until_unheld(here)
            assert (await lease(me, me.pid, layout="x"))[1:] == leased[1:]  # with its weights
            other.disconnect(CONTROL)
            await until_unheld(here)
            claim = (A("claim"), leased[1], me.pid)
            assert (await gen_server.call(me, PORTS, claim, timeout_s=10))[1:] == leased[1:]
            claim = (A("claim"), "p_99", me.pid)
            refused = await gen_server.call(me, PORTS, claim)
            assert refused[:2] == ("error", "unknown_port")

            other.disconnect(CONTROL)
            await until_unheld(here)
            second = identity_of(await lease(me, me.pid, layout="y"))
            assert second != first
            assert await first.wait_gone(timeout_s=5)  # weights of another layout: no use
            other.disconnect(CONTROL)
            await until_unheld(here)
            third = identity_of(await lease(me, me.pid, layout="y", fresh=True))
            assert await second.wait_gone(timeout_s=5)

            other.disconnect(CONTROL)
            await until_unheld(here)
            assert (await lease(me, me.pid, rank=1, layout="z", placement=1))[0] == "ok"
            assert await third.wait_gone(timeout_s=5)  # cut in another way: memory is needed

    asyncio.run(main())


def test_a_port_ends_with_its_far_holder_and_some_time_after_its_machine(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_tcp_port()
        async with (
            broker(tmp_path, epmd_port=port, orphan_s=0.5) as (_, here),
            other_machine(port) as (other, me),
        ):
            with other.open_process(label="holder") as holder:
                first = identity_of(await lease(me, holder.pid))
            assert await first.wait_gone(timeout_s=5)
            second = identity_of(await lease(me, me.pid))
            other.disconnect(CONTROL)
            await until_unheld(here)
            assert await second.wait_gone(timeout_s=5)

    asyncio.run(main())


def test_of_two_holders_the_newer_placement_wins(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_tcp_port()
        async with (
            broker(tmp_path, epmd_port=port) as (_, here),
            other_machine(port) as (_, me),
        ):
            leased = await lease(me, me.pid, placement=1)
            first = identity_of(leased)
            for placement in (0, 1):
                refused = await lease(here, here.pid, placement=placement)
                assert refused[:2] == ("error", "held")
                assert str(me.pid) in refused[2]
            claim = (A("claim"), leased[1], here.pid)
            assert (await gen_server.call(here, A("ports"), claim))[1] == "held"

            second = identity_of(await lease(here, here.pid, placement=2))
            assert second != first
            told = await me.receive(lambda m: m if m[0] == "port_exit" else None, timeout_s=5)
            assert text_of(told[1]) == text_of(leased[1])
            assert (await lease(me, me.pid, placement=1))[1] == "held"
            assert second.alive()

    asyncio.run(main())


def test_a_port_that_cannot_reach_its_holder_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_tcp_port()
        async with (
            broker(tmp_path, epmd_port=port) as (_, here),
            other_machine(port) as (_, me),
        ):
            leased = await lease(me, me.pid)
            dial = (A("dial"), A("nobody@127.0.0.1"))
            answer = await gen_server.call(here, leased[2], dial, timeout_s=10)
            assert answer[:2] == ("error", "unreachable")
            assert b"nobody@127.0.0.1" in answer[2]

    asyncio.run(main())


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_notices_the_loss_of_its_far_port(tmp_path: Path, kill: signal.Signals) -> None:
    async def main() -> None:
        port = free_tcp_port()
        async with (
            broker(tmp_path, epmd_port=port) as (_, _),
            other_machine(port) as (_, me),
        ):
            me.trap_exit = True
            lost: list[str] = []
            want = Want(instance="i", rank=0, node=CONTROL)
            limits = RankLimits(silence_s=0.8, ping_s=0.3)
            rank = await gen_server.start_link(me, Rank(want, limits, on_lost=lost.append))
            assert (await gen_server.call(me, rank, A("port"), timeout_s=30))[0] == "ok"
            known = await gen_server.call(me, rank, A("describe"))
            identity = OsIdentity.of(known["os_pid"])
            assert identity is not None
            os.kill(identity.pid, kill)
            await me.receive(lambda m: m if m[0] == "EXIT" and m[1] == rank else None, timeout_s=3)
            assert ("silent" in lost[0]) is (kill == signal.SIGSTOP)
            assert await identity.wait_gone(timeout_s=5)

    asyncio.run(main())


def test_a_rank_waits_for_a_machine_that_is_not_there_yet_and_can_be_ended(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_tcp_port()
        async with other_machine(port) as (_, me):
            me.trap_exit = True
            want = Want(instance="i", rank=0, node=CONTROL)
            waits = await gen_server.start_link(me, Rank(want))
            me.exit(waits, A("shutdown"))
            await me.receive(lambda m: m if m[:2] == ("EXIT", waits) else None, timeout_s=1)

            rank = await gen_server.start_link(me, Rank(want))
            async with broker(tmp_path, epmd_port=port):
                assert (await gen_server.call(me, rank, A("port"), timeout_s=30))[0] == "ok"
                me.exit(rank, A("shutdown"))
                await me.receive(lambda m: m if m[:2] == ("EXIT", rank) else None, timeout_s=5)
                rows = await gen_server.call(me, PORTS, A("ports"))
                assert rows == []

            limits = RankLimits(lease_s=0.3)
            hopeless = await gen_server.start_link(me, Rank(want, limits))
            _, _, reason = await me.receive(
                lambda m: m if m[:2] == ("EXIT", hopeless) else None, timeout_s=5
            )
            assert reason[0] == "no_port"
            assert "nodedown" in reason[1]

    asyncio.run(main())
