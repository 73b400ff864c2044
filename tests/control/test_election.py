"""The election server: real nodes on the real wire, real files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.local_node import LocalNode
from bridge.node import Node
from bridge.term import Atom, Pid, Term
from control.election import Election, ElectionFiles
from control.election_state import Promise
from control.quorum import alone, configured

A, B, C = "a@127.0.0.1", "b@127.0.0.1", "c@127.0.0.1"
ASK = Atom("leader"), Atom("epoch"), Atom("authority")


async def ask(node: LocalNode, request: Term) -> Any:
    return await gen_server.node_call(node, Atom("election"), request, timeout_s=5)


def alone_at(path: Path, **settings: Any) -> list[Any]:
    """Start an election on a node without a network; what it answers at once."""

    async def main() -> list[Any]:
        node = LocalNode(A, creation=1)
        server = Election(path, candidate=settings.pop("candidate", True), **settings)
        pid = await gen_server.start(node, server, name="election")
        answers = [await ask(node, request) for request in ASK]
        node.exit(pid, pid, Atom("shutdown"))
        return answers

    return asyncio.run(main())


def test_a_machine_alone_leads_once_it_has_started(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        leader, seen, authority = alone_at(tmp_path / "epoch")
        assert leader == ("ok", A)
        assert seen == epoch
        assert authority[:2] == ("ok", epoch)
        assert authority[2] > 0
    assert (tmp_path / "epoch").read_text() == f"3\n{A}\n"


def test_the_file_of_an_older_release_is_read(tmp_path: Path) -> None:
    (tmp_path / "epoch").write_text("41\n")
    assert alone_at(tmp_path / "epoch")[1] == 42


@pytest.mark.parametrize("name", ["epoch", "roster.json"])
def test_a_broken_file_is_named_and_does_not_stop_the_node(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_text("{?")
    assert alone_at(tmp_path / "epoch")[0] == ("ok", A)
    assert str(tmp_path / name) in caplog.text


def test_a_disk_that_takes_nothing_does_not_cost_the_node(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert alone_at(tmp_path / "missing" / "epoch")[0] == ("ok", A)
    assert "this machine has no say until it can" in caplog.text


def test_without_the_coordinator_role_nobody_leads(tmp_path: Path) -> None:
    leader, epoch, authority = alone_at(tmp_path / "epoch", candidate=False)
    assert (leader, epoch) == (("error", "no_leader"), 0)
    assert authority == ("error", "no_authority", "nobody leads")


def test_one_of_three_configured_machines_may_not_place(tmp_path: Path) -> None:
    leader, _, authority = alone_at(tmp_path / "epoch", machines=(A, B, C))
    assert leader == ("ok", A)  # head of its side
    assert authority[:2] == ("error", "no_authority")
    assert authority[2] == (
        f"nobody leads; 1 of 3 machines are here, 2 are needed; missing: {B}, {C}"
    )


def test_a_configuration_that_is_gone_leaves_a_machine_of_its_own(tmp_path: Path) -> None:
    alone_at(tmp_path / "epoch", machines=(A, B, C))
    assert alone_at(tmp_path / "epoch")[2][0] == "ok"


def test_files(tmp_path: Path) -> None:
    for roster in (alone(A, "1"), configured([A, B])):
        assert ElectionFiles(tmp_path / "epoch").save(Promise(7, B), roster)
        again = ElectionFiles(tmp_path / "epoch")
        assert (again.promise(A), again.roster()) == (Promise(7, B), roster)


class Machine:
    """A node with an election, told by the test who is up."""

    def __init__(self, name: str, home: Path) -> None:
        self.name, self.home = name, home
        self.node = Node(name, "secret")
        self.pid: Pid | None = None

    async def start(self, **settings: Any) -> None:
        self.home.mkdir(exist_ok=True)
        if self.node.address is None:
            await self.node.start(listen=("127.0.0.1", 0), epmd=None)
        server = Election(self.home / "epoch", candidate=True, **settings)
        self.parent = self.node.open_process().__enter__()
        self.parent.trap_exit = True
        self.pid = await gen_server.start_link(self.parent, server, name="election")

    def tell(self, what: str, other: str) -> None:
        assert self.pid is not None
        self.node.send(self.pid, self.pid, (Atom(what), Atom(other)))

    async def shut_down(self) -> None:
        """End the server as its supervisor does."""
        assert self.pid is not None
        monitor = self.parent.monitor(self.pid)
        self.parent.exit(self.pid, Atom("shutdown"))
        await self.parent.receive(
            lambda m: True if m[:2] == ("DOWN", monitor) else None, timeout_s=5
        )

    async def meet(self, other: Machine) -> None:
        assert await self.node.connect(other.name, address=other.node.address, timeout_s=5)
        self.tell("node_up", other.name)
        other.tell("node_up", self.name)

    async def places(self) -> bool:
        return bool((await ask(self.node, Atom("authority")))[0] == "ok")


@asynccontextmanager
async def machines(tmp_path: Path, **settings: Any) -> AsyncIterator[list[Machine]]:
    made = [Machine(name, tmp_path / name[0]) for name in (A, B, C)]
    try:
        for machine in made:
            await machine.start(**settings)
        for i, machine in enumerate(made):
            for other in made[:i]:
                await machine.meet(other)
        yield made
    finally:
        for machine in made:
            await machine.node.stop()


async def one_leader(made: list[Machine], timeout_s: float) -> Machine:
    """The machine that may place, once all know it."""
    found: list[Machine] = []

    async def agreed() -> bool:
        found[:] = [m for m in made if await m.places()]
        told = {await ask(m.node, Atom("leader")) for m in made}
        return len(found) == 1 and told == {("ok", found[0].name)}

    await until(timeout_s, agreed)
    return found[0]


async def all_are_members(made: list[Machine]) -> bool:
    """No change of the roster is under way, on any disk."""
    for machine in made:
        dest = Atom("election")
        with machine.node.open_process() as me:
            state: Any = await gen_server.sys_call(me, dest, Atom("get_state"))
        if len(state[1]["members"]) < len(made) or state[1]["members_before"]:
            return False
    return True


async def until(timeout_s: float, happened: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(timeout_s):
        tick = asyncio.Event()
        while not await happened():
            asyncio.get_running_loop().call_later(0.02, tick.set)
            await tick.wait()
            tick.clear()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"machines": (A, B, C)}, {"gated": False}])
def test_three_machines_agree_and_survive_their_leader(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Configured, and three that begin as clusters of their own."""

    async def main() -> None:
        async with machines(tmp_path, **settings) as made:
            leader = await one_leader(made, 10)
            await until(10, partial(all_are_members, made))
            epoch = await ask(leader.node, Atom("epoch"))
            await leader.node.stop()
            rest = [m for m in made if m is not leader]
            for machine in rest:
                machine.tell("node_down", leader.name)
            following = await one_leader(rest, 4)
            assert await ask(following.node, Atom("epoch")) > epoch
            old = (Atom("obey"), Atom(leader.name), epoch)
            assert (await ask(rest[0].node, old))[:2] == ("error", "old_epoch")
            new = (Atom("obey"), Atom(following.name), epoch + 1)
            assert await ask(rest[1].node, new) == "ok"

    asyncio.run(main())


@pytest.mark.slow
def test_a_server_that_ends_in_good_order_is_replaced_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with machines(tmp_path, machines=(A, B, C)) as made:
            leader = await one_leader(made, 10)
            await leader.shut_down()
            rest = [m for m in made if m is not leader]
            for machine in rest:
                machine.tell("node_down", leader.name)
            await one_leader(rest, 1.5)  # nobody is bound to it any more

    asyncio.run(main())


def test_what_is_no_message_is_logged_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        node = LocalNode(A, creation=1)
        server = Election(tmp_path / "epoch", candidate=True)
        pid = await gen_server.start(node, server, name="election")
        bad: Term
        for bad in (7, (Atom("lead"), 1), (Atom("status"),), (Atom("grant"), 1, [])):
            node.send(pid, pid, (Atom("election"), Atom(B), bad))
        assert await ask(node, Atom("leader")) == ("ok", A)

    asyncio.run(main())
    assert caplog.text.count(f"{B} sent ") == 4
