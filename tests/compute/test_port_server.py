"""Two servers of ports as one mesh: prepared, loaded, asked, adopted; no secret is shown."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.node import Node
from bridge.term import Atom, Pid, Term
from compute.port_server import PortServer
from compute.worker import Load
from tests.models.tiny import llama_tensors, write_gguf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # compiles on a fresh machine
CALL_S = 200.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", llama_tensors())


class Ports:
    """Two ports on a node, and what they ended with."""

    def __init__(self, node: Node, pids: list[Pid], ended: list[int]) -> None:
        self.node, self.pids, self.ended = node, pids, ended

    async def call(self, rank: int, request: Term) -> Any:
        return await gen_server.node_call(self.node, self.pids[rank], request, timeout_s=CALL_S)

    async def prepare(self) -> list[Term]:
        answers = [await self.call(rank, (Atom("prepare"), "127.0.0.1")) for rank in (0, 1)]
        assert [answer[0] for answer in answers] == ["ok", "ok"]
        assert [answer[1]["holds"] for answer in answers] == ["", ""]
        return [answer[1]["place"] for answer in answers]


@contextlib.asynccontextmanager
async def two_ports() -> AsyncIterator[Ports]:
    node, ended = Node("ports@127.0.0.1", "c"), list[int]()
    servers = [PortServer(f"p{rank}", end=ended.append) for rank in (0, 1)]
    pids = [await gen_server.start(node, server) for server in servers]
    yield Ports(node, pids, ended)
    with node.open_process(label="end") as me:
        for pid in reversed(pids):  # the head last: a follower without one ends its process
            gone = me.monitor(pid)
            gen_server.cast(me, pid, Atom("stop"))
            await me.receive(lambda m, gone=gone: m if m[:2] == ("DOWN", gone) else None)  # type: ignore[misc]
    await node.stop()


def order(model: Path, rank: int, places: list[Term], group: str, **more: Term) -> Term:
    options: dict[Any, Term] = {
        Atom("instance"): "i",
        Atom("epoch"): 1,
        Atom("group"): group,
        Atom("rank"): rank,
        Atom("tensor"): 2,
        Atom("places"): places,
        Atom("path"): str(model),
        Atom("context_tokens"): 64,
        Atom("threads"): 1,
        Atom("device"): "cpu",
        Atom("join_timeout_s"): 60.0,
    }
    return (Atom("load"), options | {Atom(key): value for key, value in more.items()})


def test_two_ports_become_a_mesh_and_the_head_answers(model: Path) -> None:
    async def scenario() -> None:
        async with two_ports() as ports:
            places, group = await ports.prepare(), secrets.token_hex(16)
            with ports.node.open_process(label="test") as me:
                answers = await asyncio.gather(
                    *(ports.call(rank, order(model, rank, places, group)) for rank in (0, 1))
                )
                assert [answer[0] for answer in answers] == ["ok", "ok"]
                facts = [answer[1] for answer in answers]
                assert [f["query_heads"] for f in facts] == [[0, 2], [2, 4]]
                assert facts[0]["layers"] == [0, 2]

                held = await ports.call(1, (Atom("prepare"), "127.0.0.1"))
                assert held[1]["holds"] == group
                again = await ports.call(1, order(model, 1, places, group, epoch=2))
                assert again == ("ok", facts[1])  # adopted: nothing is loaded twice
                port = held[1]["place"]["ports"]["orders"]
                with pytest.raises(ConnectionRefusedError):  # and nothing is left to be met at
                    socket.create_connection(("127.0.0.1", port), timeout=1.0)
                other = await ports.call(1, order(model, 1, places, "another"))
                assert other[:2] == ("error", "busy")

                for rank, expected in ((0, "length"), (1, "error")):  # a follower takes no requests
                    ref = me.make_ref()
                    ask = {Atom("prompt"): [1, 2, 3], Atom("max_tokens"): 4, Atom("temperature"): 0}
                    gen_server.cast(me, ports.pids[rank], (Atom("submit"), me.pid, ref, ask))
                    tokens = 0
                    while True:
                        message = await me.receive(timeout_s=CALL_S)
                        assert isinstance(message, tuple)
                        assert message[1] == ref
                        if message[0] == "done":
                            assert message[2] == expected, message
                            assert message[4] == {"cached_tokens": 0, "wait_s": 0.0}
                            break
                        tokens += message[0] == "token"
                    assert tokens == (4 if expected == "length" else 0)

                ok, load = await ports.call(0, Atom("queue"))
                assert ok == "ok"
                assert set(load) == {field.name for field in fields(Load)}
                assert (load["waiting"], load["running"], load["wait_s"]) == (0, 0, 0.0)
                assert load["most_running"] == 16
                assert load["free_tokens"] == load["memory_tokens"] == 4 * 64
                assert load["prompt_tokens"] == 3
                assert (await ports.call(1, Atom("queue")))[:2] == ("error", "not_loaded")

                # A new owner: what the one before let through is asked for again, if it is.
                head, old, new = ports.pids[0], me.make_ref(), me.make_ref()
                ask = {Atom("prompt"): [1, 2, 3], Atom("max_tokens"): 4, Atom("temperature"): 0}
                with ports.node.open_process(label="owner") as owner:
                    gen_server.cast(me, head, (Atom("own"), owner.pid))
                    gen_server.cast(me, head, (Atom("submit"), me.pid, old, ask))
                    gen_server.cast(me, head, (Atom("own"), me.pid))
                    gen_server.cast(me, head, (Atom("submit"), me.pid, new, ask))
                    refs: list[Term] = []
                    while True:
                        message = await me.receive(timeout_s=CALL_S)
                        assert isinstance(message, tuple)
                        refs.append(message[1])
                        if message[0] == "done":
                            break
                assert set(refs) == {new}
            assert not ports.ended

    asyncio.run(scenario())


def test_orders_that_cannot_be_are_answered_and_the_port_goes_on(model: Path) -> None:
    async def scenario() -> None:
        async with two_ports() as ports:
            places = await ports.prepare()
            text = "not an address of this machine"
            assert (await ports.call(0, (Atom("prepare"), text)))[:2] == ("error", "bad_host")
            for change, kind in (
                ({"tensor": 0}, "bad_order"),
                ({"shares": [1.0]}, "bad_order"),
                ({"nonsense": 1}, "bad_order"),
                ({"shares": [1.0, -1.0]}, "illegal_shares"),
                ({"limit_bytes": 1 << 20}, "no_room"),
                ({"path": "/nowhere.gguf"}, "no_such_model"),
                ({"join_timeout_s": 0.2}, "peer_lost"),
                ({"hosts": ["here", "there"], "join_timeout_s": 0.2}, "peer_lost"),
            ):
                places = await ports.prepare()
                answer = await ports.call(0, order(model, 0, places, "g", **change))
                assert answer[:2] == ("error", kind), (change, answer)
            assert not ports.ended

    asyncio.run(scenario())


def test_no_view_of_a_port_shows_its_group(model: Path) -> None:
    async def scenario() -> None:
        async with two_ports() as ports:
            places, group = await ports.prepare(), secrets.token_hex(16)
            load = order(model, 0, places, group, join_timeout_s=0.2)
            loading = asyncio.create_task(ports.call(0, load))  # waits for the other in vain
            facts = await ports.call(0, Atom("facts"))
            with ports.node.open_process(label="test") as me:
                shown = await gen_server.sys_call(
                    me, ports.pids[0], Atom("get_state"), timeout_s=5.0
                )
            assert group not in repr(shown)
            assert group not in repr(facts)
            assert "tiny.gguf" in repr(shown)  # the rest of the order is
            assert (await loading)[0] == "error"
            server = PortServer("x", end=ports.ended.append)
            message = (Atom("$gen_call"), (ports.pids[0], Atom("tag")), load)
            assert group in repr(message)
            assert group not in repr(server.format_message(message))

    asyncio.run(scenario())
