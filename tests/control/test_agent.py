"""An agent among stand-ins: it obeys the leader of the newest epoch, one order after the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.local_node import LocalNode
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from control.agent import Agent, GroupRecord
from control.instance import History
from control.instance_spec import InstanceSpec, spec_of, spec_term
from control.rank import RankLimits
from tests.control.in_loop import in_loop
from tests.control.specs import spec

A = Atom
N, LEADER = "n@h", A("leader@h")


class Election(GenServer):
    """``election``: obeys one epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 3

    async def handle_call(self, request: Any, from_: Term) -> Term:
        _, _, epoch = request
        return A("ok") if epoch >= self.epoch else (A("error"), A("old_epoch"), "it is over")


class Ports(GenServer):
    """``ports``: with weights of these instances."""

    def __init__(self) -> None:
        super().__init__()
        self.adopted: list[str] = []

    async def handle_call(self, request: Term, from_: Term) -> Term:
        return [{A("instance"): id_, A("adopted"): True} for id_ in self.adopted]


class Coordinator(GenServer):
    """Of a group: knows its spec, and drains when it is told to."""

    def __init__(self, of: InstanceSpec) -> None:
        super().__init__()
        self.spec, self.drains, self.history = of, asyncio.Event(), History(epoch=of.first_epoch)
        self.waiting: list[Term] = []
        self.silent = False

    async def handle_call(self, request: Term, from_: Term) -> Term:
        if request == "books":
            if self.silent:
                raise gen_server.Stop(A("normal"))
            return (self.spec, self.history)
        self.waiting.append(from_)
        self.drains.set()
        return NOREPLY

    def drained(self) -> None:
        for from_ in self.waiting:
            gen_server.reply(self.me, from_, A("ok"))


class Groups(GenServer):
    """``instance_sup``: a group is a process and its coordinator."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, InstanceSpec] = {}
        self.groups: dict[str, tuple[Pid, Coordinator]] = {}
        self.begun: list[int] = []

    async def handle_call(self, request: Any, from_: Term) -> Term:
        match request:
            case "which_children":
                found = self.groups.items()
                rows: list[Term] = [(A(i), group, A("supervisor"), []) for i, (group, _) in found]
                return rows
            case ("start_child", child):
                id_ = str(child.id)
                one = Coordinator(self.specs[id_])
                await gen_server.start(self.me.node, one, name=id_)
                group = self.me.node.spawn(_wait, name=f"{id_}_sup")
                self.groups[id_] = (group, one)
                self.begun.append(one.spec.first_epoch)
                return (A("ok"), group)
            case ("terminate_child", id_) if str(id_) in self.groups:
                group, one = self.groups.pop(str(id_))
                self.me.exit(one.me.pid, A("kill"))
                self.me.exit(group, A("kill"))
                return A("ok")
            case _:
                return (A("error"), A("not_found"))


async def _wait(me: Process) -> None:
    await me.receive()


class Lab:
    """A machine with an agent."""

    def __init__(self, folder: Path) -> None:
        self.node = LocalNode(N, creation=1)
        self.election, self.groups, self.ports = Election(), Groups(), Ports()
        self.record_path = folder / "groups"
        self.agent = Agent(RankLimits(), record_path=self.record_path)

    async def ask(self, *request: Any) -> Any:
        term: Term = tuple(A(r) if n == 0 else r for n, r in enumerate(request))
        plain = A(request[0]) if len(request) == 1 else term
        return await gen_server.node_call(self.node, A("agent"), plain, timeout_s=10)

    async def start(self, one: InstanceSpec, epoch: int = 3) -> Any:
        self.groups.specs[one.id] = one
        return await self.ask("start", LEADER, epoch, spec_term(one))

    def soon(self, *request: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self.ask(*request))

    async def running(self) -> dict[str, tuple[Term, int]]:
        ok, rows = await self.ask("running")
        assert ok == "ok"
        return {spec_of(r["spec"]).id: (r["group"], r["epoch"]) for r in rows}


@contextlib.asynccontextmanager
async def machine(folder: Path) -> AsyncIterator[Lab]:
    lab = Lab(folder)
    servers = {"election": lab.election, "ports": lab.ports, "instance_sup": lab.groups}
    for name, server in {**servers, "agent": lab.agent}.items():
        await gen_server.start(lab.node, server, name=name)
    yield lab


@in_loop
async def test_an_order_of_an_epoch_that_is_over_is_refused(tmp_path: Path) -> None:
    async with machine(tmp_path) as lab:
        ok, group = await lab.start(spec("a", N))
        assert ok == "ok"
        assert await lab.start(spec("a", N)) == (A("ok"), group)  # it is what runs
        for order in (lab.start(spec("b", N), epoch=2), lab.ask("stop", LEADER, 2, "a", 0)):
            assert (await order)[:2] == (A("error"), A("old_epoch"))
        assert await lab.running() == {"a": (group, 0)}
        assert (await lab.start(spec("c", "m@h")))[1] == A("bad_spec")  # of another machine
        assert (await lab.ask("start", LEADER, 3, {A("id"): 5}))[1] == A("bad_spec")
        assert await lab.ask("stop", LEADER, 4, "a", 0) == A("ok")
        assert await lab.running() == {}


@in_loop
async def test_an_epoch_that_ends_while_an_order_waits_ends_the_order(tmp_path: Path) -> None:
    async with machine(tmp_path) as lab:
        await lab.start(spec("a", N))
        _, coordinator = lab.groups.groups["a"]
        stop = lab.soon("stop", LEADER, 3, "a", 20)
        await coordinator.drains.wait()
        lab.groups.specs["a"] = spec("a", N, first_epoch=4)
        start = lab.soon("start", LEADER, 3, spec_term(lab.groups.specs["a"]))
        await lab.ask("running")  # it is in the queue
        lab.election.epoch = 5
        coordinator.drained()
        assert await stop == A("ok")
        assert (await start)[:2] == (A("error"), A("old_epoch"))
        assert lab.groups.begun == [0]


@in_loop
async def test_orders_about_an_instance_come_after_each_other(tmp_path: Path) -> None:
    """A stop that drains must not end what is started after it."""
    async with machine(tmp_path) as lab:
        _, old = await lab.start(spec("a", N))
        _, coordinator = lab.groups.groups["a"]
        surplus = lab.soon("stop", LEADER, 3, "a", 20, old)
        await coordinator.drains.wait()
        again = lab.soon("stop", LEADER, 3, "a", 20, old)
        lab.groups.specs["a"] = spec("a", N, first_epoch=4)
        start = lab.soon("start", LEADER, 3, spec_term(lab.groups.specs["a"]))
        late = lab.soon("stop", LEADER, 3, "a", 20, old)  # the one that is gone is meant
        assert (await lab.start(spec("b", N)))[0] == "ok"  # another does not wait
        coordinator.drained()
        assert [await stop for stop in (surplus, again, late)] == [A("ok")] * 3
        ok, new = await start
        assert ok == "ok"
        assert new != old
        assert (await lab.running())["a"] == (new, 4)
        assert lab.groups.begun == [0, 0, 4]
        assert not lab.agent._turns
        assert not lab.agent._queued


@in_loop
async def test_how_a_group_came_to_its_end(tmp_path: Path) -> None:
    async with machine(tmp_path) as lab:
        await lab.start(spec("a", N, first_epoch=2))
        lab.agent._histories["a"].note("out of memory")
        ok, why = await lab.ask("why", "a")
        assert ok == "ok"
        assert why == {
            "alone": True,
            "ordered": False,
            "exhausted": False,
            "epoch": 2,
            "last_error": "out of memory",
        }
        await lab.ask("stop", LEADER, 3, "a", 0)
        _, why = await lab.ask("why", "a")
        assert why["ordered"] is True
        assert lab.agent.format_state() == {}
        pid = lab.node.whereis("instance_sup")
        assert pid is not None
        lab.node.exit(pid, pid, A("kill"))
        _, why = await lab.ask("why", "a")
        assert why["alone"] is False


@in_loop
async def test_a_group_that_cannot_say_what_it_is_is_ended(tmp_path: Path) -> None:
    async with machine(tmp_path) as lab:
        await lab.start(spec("a", N))
        await lab.start(spec("b", N))
        lab.groups.groups["a"][1].silent = True
        assert list(await lab.running()) == ["b"]
        assert list(lab.groups.groups) == ["b"]


@in_loop
async def test_an_order_that_crashes_is_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with machine(tmp_path) as lab:
        await lab.start(spec("a", N))
        lab.ports.adopted = [5]  # type: ignore[list-item]
        lab.agent._record.former = {"5": None}  # type: ignore[dict-item]
        answer = await lab.ask("running")
        assert answer[:2] == (A("error"), A("internal_error"))
        assert not lab.agent._askers


@in_loop
async def test_a_former_life_left_ports_with_weights(tmp_path: Path) -> None:
    async with machine(tmp_path) as lab:
        for id_ in ("a", "b", "c"):
            await lab.start(spec(id_, N, num_bytes=7))
        await lab.ask("stop", LEADER, 3, "b", 0)
    async with machine(tmp_path) as lab:
        lab.ports.adopted = ["a", "b"]
        assert await lab.running() == {"a": (A("undefined"), 0)}
        _, group = await lab.start(spec("a", N, num_bytes=7))
        assert await lab.running() == {"a": (group, 0)}


@pytest.mark.parametrize("data", [b"", b"\x83", b"\x83h\x00", b"nonsense"])
def test_a_record_that_cannot_be_read_costs_a_reload(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "groups"
    path.write_bytes(data)
    record = GroupRecord(path)
    record.read()
    assert record.former == {}
    record.add(spec("a", N))
    again = GroupRecord(path)
    again.read()
    assert again.former == {"a": spec("a", N)}
