"""Schedulers among stand-ins for their neighbours: the test says who is up and who leads.

Each machine has a real node and a real scheduler. ``agent`` starts coordinators that are ready at
once, ``model_store`` has every file or none, ``election`` and ``membership`` say what they
are told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.errors import UnknownModel
from control.instance_spec import InstanceSpec, spec_of, spec_term
from control.lookup import Lookup, Resolved
from control.machine import Device, Machine
from control.placement_request import Defaults
from control.quorum import Roster, configured, roster_term
from control.scheduler import Scheduler
from models.card import load_cards
from tests.models.tiny import llama_tensors, write_gguf

A = Atom
CARD = load_cards()["llama-3.2-1b-instruct"]
ROLES = ("compute", "coordinator", "storage")


def machine_with(limit_bytes: int) -> Machine:
    return Machine(
        total_bytes=8 * 10**9,
        available_bytes=8 * 10**9,
        limit_bytes=limit_bytes,
        cores=4,
        devices=(Device("cpu", "Testchip", 8 * 10**9),),
    )


class Election(GenServer):
    """``election``: the leader is whom the test says."""

    def __init__(self, roster: Roster) -> None:
        super().__init__()
        self.leader, self.epoch, self.sure, self.roster = "", 0, False, roster
        self.commands = 0
        self.asked = asyncio.Event()  # somebody wanted to know whether this node may place

    async def handle_call(self, request: Term, from_: Term) -> Term:
        self.asked.set()
        if request == "authority" and self.sure and self.leader == self.me.node.name:
            return (A("ok"), self.epoch, 5.0, roster_term(self.roster))
        return (A("error"), A("no_authority"), "the test says no")

    async def handle_cast(self, message: Term) -> None:
        match message:
            case "leadership":
                self.tell()
            case ("commands_seen", int(version)):
                self.commands = version

    def tell(self) -> None:
        leader, roster = A(self.leader or "undefined"), roster_term(self.roster)
        told = (A("leadership"), leader, self.epoch, self.sure, roster)
        self.me.send(A("scheduler"), told)


class Membership(GenServer):
    """``membership``: rows of all machines of the lab."""

    def __init__(self, lab: Lab, name: str) -> None:
        super().__init__()
        self.lab, self.name, self.subscribers = lab, name, list[Pid]()
        self.up: set[str] = set()
        self.stalls = False  # machines are not told

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("subscribe", Pid() as pid):
                self.subscribers.append(pid)
                return (A("ok"), [A(node) for node in sorted(self.up)])
            case "up":
                return [A(node) for node in sorted(self.up)]
            case _ if self.stalls:
                return NOREPLY
            case _:
                return [self._row(one) for one in self.lab.machines.values()]

    def _row(self, one: LabMachine) -> Term:
        up = one.name in self.up or one.name == self.name
        return {
            A("name"): A(one.name),
            A("state"): A("up" if up else "down"),
            A("why"): "" if up else self.lab.why_down,
            A("roles"): [A(role) for role in ROLES],
            A("addresses"): [],
            A("speeds"): [],
            **machine_with(one.limit_bytes).to_term(),
        }

    def note(self, what: str, node: str) -> None:
        (self.up.add if what == "node_up" else self.up.discard)(node)
        for pid in self.subscribers:
            self.me.send(pid, (A(what), A(node)))


class Coordinator(GenServer):
    """Of a group without ranks: ready at once."""

    def __init__(self, spec: InstanceSpec) -> None:
        super().__init__()
        self.spec, self.epoch, self.state = spec, spec.first_epoch + 1, "ready"
        self.idle_s = 0.0
        self.drained = asyncio.Event()

    async def init(self, me: Process) -> None:
        self.tell()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        return self.idle_s

    async def handle_info(self, message: Term) -> None:
        match message:
            case "announce":
                self.tell()
            case ("announce", Pid() as asker):
                self.tell_one(str(asker.node))

    def tell(self) -> None:
        for node in (self.me.node.name, *self.me.node.nodes()):
            self.tell_one(str(node))

    def tell_one(self, node: str) -> None:
        known: Term = {A("model"): self.spec.model, A("context_tokens"): self.spec.context_tokens}
        state = (A(self.state), self.me.pid, self.epoch, "")
        self.me.send((A("scheduler"), A(node)), (A("instance"), self.spec.id, *state, known))


class Agent(GenServer):
    """``agent``: its groups are a coordinator each.

    Attributes:
        started, stopped: ids of orders, the first first.
        deaf: nothing is answered until ``hear_again``; a start is not even done.
        refuses: starts fail.
        known: what it says to ``why``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[str, tuple[Coordinator, Pid]] = {}
        self.started: list[InstanceSpec] = []
        self.stopped: list[tuple[str, float]] = []
        self.deaf = False
        self.asked: list[tuple[Term, Any]] = []  # what was not answered
        self.refuses = False
        self.known: dict[Any, Term] = {}

    async def handle_call(self, request: Term, from_: Term) -> Term:
        if self.deaf:
            self.asked.append((request, from_))
            return NOREPLY
        match request:
            case ("start", *_) if self.refuses:
                return (A("error"), A("start_failed"), "the test says no")
            case ("start", _, int(), term):
                return (A("ok"), await self.begin(spec_of(term)))
            case ("stop", _, int(), id_, float(drain_s), *_):
                self.stopped.append((text_of(id_), drain_s))
                self.end(text_of(id_), A("shutdown"))
                return A("ok")
            case "running":
                rows: list[Term] = [
                    {
                        A("spec"): spec_term(one.spec),
                        A("group"): group,
                        A("epoch"): one.epoch,
                    }
                    for one, group in self.groups.values()
                ]
                return (A("ok"), rows)
            case ("why", _):
                return (A("ok"), self.known)
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        self.deaf, asked = False, self.asked
        self.asked = []
        for request, from_ in asked:
            gen_server.reply(self.me, from_, await self.handle_call(request, from_))

    def hear_again(self) -> None:
        self.me.send(self.me.pid, A("hear_again"))

    async def begin(self, spec: InstanceSpec) -> Pid:
        self.started.append(spec)
        one = Coordinator(spec)
        await gen_server.start(self.me.node, one, name=spec.id)
        group = self.me.node.spawn(_wait, label="group")
        self.groups[spec.id] = (one, group)
        return group

    def end(self, id_: str, reason: Term) -> None:
        if id_ in self.groups:
            one, group = self.groups.pop(id_)
            self.me.exit(one.me.pid, A("kill"))
            self.me.exit(group, reason)


async def _wait(me: Process) -> None:
    await me.receive()


class Store(GenServer):
    """``model_store``: all of a model that ``has`` names; ``slow`` never comes from outside."""

    def __init__(self, path: Path, has: set[str]) -> None:
        super().__init__()
        self.path, self.has = path, has
        self.asked: list[Term] = []

    async def handle_call(self, request: Term, from_: Term) -> Term:
        self.asked.append(request)
        match request:
            case ("locate", ref):
                whole = text_of(ref) in self.has
                path: Term = str(self.path) if whole else A("undefined")
                return (A("ok"), {A("whole"): whole, A("path"): path})
            case ("ensure", ref, *_) if text_of(ref) == "slow":
                return NOREPLY
            case ("ensure", ref, *_) if text_of(ref) == "broken":
                return (A("error"), A("download_failed"), "no such host")
            case ("ensure", ref, *_):
                return (A("ok"), str(self.path))
        return await super().handle_call(request, from_)


class Links(GenServer):
    """``link_probe``: nothing is measured."""

    async def handle_call(self, request: Term, from_: Term) -> Term:
        return []


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class LabMachine:
    """A node with its servers."""

    def __init__(self, lab: Lab, name: str, limit_bytes: int) -> None:
        self.lab, self.name, self.limit_bytes = lab, name, limit_bytes
        self.node = Node(name, "secret")
        self.folder = lab.folder / name.partition("@")[0]
        self.folder.mkdir(exist_ok=True)
        self.desired_path = self.folder / "desired.json"
        self.election, self.agent = Election(lab.roster), Agent()
        self.membership = Membership(lab, name)
        self.store = Store(lab.model, {"tiny"})
        self.scheduler = Scheduler(
            Lookup(resolve=lab.resolve, card_of=lambda name: lab.resolve(name).id),
            desired_path=self.desired_path,
            defaults=Defaults(context_tokens=128),
            autoload=lab.autoload,
            now_s=lab.clock,
        )

    async def start(self) -> None:
        for name, server in (
            ("election", self.election),
            ("membership", self.membership),
            ("agent", self.agent),
            ("model_store", self.store),
            ("link_probe", Links()),
            ("scheduler", self.scheduler),
        ):
            await gen_server.start(self.node, server, name=name)

    async def ask(self, *request: Any, timeout_s: float = 10) -> Any:
        """Call the scheduler; the first word is an atom."""
        term: Term = tuple(A(request[0]) if n == 0 else part for n, part in enumerate(request))
        plain = A(request[0]) if len(request) == 1 else term
        to = A("scheduler")
        answer: Any = await gen_server.node_call(self.node, to, plain, timeout_s=timeout_s)
        if isinstance(answer, tuple):  # text that has travelled is a binary
            return tuple(text_of(part) if isinstance(part, bytes) else part for part in answer)
        return answer

    def tell(self, message: Term) -> None:
        with self.node.open_process(label="test") as me:
            me.send(A("scheduler"), message)

    async def leads(self) -> None:
        """Return once its books are open."""
        await until(lambda: self.state()["leading"])

    def state(self) -> Any:
        """What the scheduler shows of itself."""
        return self.scheduler.format_state()

    def known_states(self) -> list[tuple[str, str]]:
        """What its books say, without asking."""
        return [(record.id, record.state) for record in self.scheduler.books]

    def text_of(self, id_: str) -> str:
        """What its books say of an instance."""
        record = self.scheduler.books.get(id_)
        return record.text if record else ""

    def tick(self) -> None:
        self.tell((A("tick"),))

    async def rows(self) -> dict[str, Any]:
        return {text_of(row["id"]): row for _, row in await self.ask("instances")}

    async def states(self) -> dict[str, str]:
        return {id_: str(row["state"]) for id_, row in (await self.rows()).items()}


class Lab:
    """Machines that are connected; nobody leads until ``lead``.

    Args:
        limits: memory that each lends, in bytes, by node name.
    """

    def __init__(self, folder: Path, limits: dict[str, int], *, autoload: bool = False) -> None:
        self.folder, self.autoload = folder, autoload
        self.clock, self.why_down = Clock(), "silent for 3.1 s"
        self.model = write_gguf(folder / "tiny.gguf", llama_tensors())
        self.roster = configured(list(limits))
        self.machines: dict[str, LabMachine] = {}
        self.machines.update((n, LabMachine(self, n, size)) for n, size in limits.items())

    def resolve(self, ref: str) -> Resolved:
        """The models that all know."""
        if ref in ("far", CARD.id):
            return Resolved(CARD.id, ref, None, CARD)
        if ref in ("tiny", "slow", "broken"):
            return Resolved(ref, ref, self.model)
        if ref == "hf:org/repo":
            return Resolved(ref, ref, None)
        raise UnknownModel(ref)

    def lead(self, leader: str, epoch: int, *, sure: bool = True, only: str = "") -> None:
        """Every election, or one, says that ``leader`` leads ``epoch``."""
        for name, one in self.machines.items():
            if only in ("", name):
                election = one.election
                election.leader, election.epoch = leader, epoch
                election.sure = sure and name == leader
                election.tell()

    async def meet(self, a: str, b: str) -> None:
        """They are connected, and membership says so."""
        one, other = self.machines[a], self.machines[b]
        if A(b) not in one.node.nodes():
            assert await one.node.connect(b, address=other.node.address, timeout_s=5)
        one.membership.note("node_up", b)
        other.membership.note("node_up", a)

    def cut_off(self, name: str) -> None:
        """No machine sees it any more, and it sees none."""
        for other in self.machines:
            if other != name:
                self.part(name, other)

    async def come_back(self, name: str) -> None:
        """All see it again."""
        for other in self.machines:
            if other != name:
                await self.meet(name, other)

    def part(self, a: str, b: str) -> None:
        """The connection is cut, and membership says so."""
        one, other = self.machines[a], self.machines[b]
        one.node.disconnect(b)
        other.node.disconnect(a)
        one.membership.note("node_down", b)
        other.membership.note("node_down", a)

    def __getitem__(self, name: str) -> LabMachine:
        return self.machines[name]


@contextlib.asynccontextmanager
async def lab(
    folder: Path,
    limits: dict[str, int],
    *,
    leader: str = "",
    autoload: bool = False,
    apart: bool = False,
) -> AsyncIterator[Lab]:
    """Machines that all know each other, or are ``apart``; ``leader`` leads epoch 1."""
    made = Lab(folder, limits, autoload=autoload)
    names = list(limits)
    try:
        for one in made.machines.values():
            if len(names) > 1:
                await one.node.start(listen=("127.0.0.1", 0), epmd=None)
            await one.start()
        for n, name in enumerate(names):
            for other in names[:n] if not apart else ():
                await made.meet(name, other)
        if leader:
            made.lead(leader, 1)
            await made[leader].leads()
        yield made
    finally:
        for one in made.machines.values():
            await one.node.stop()


async def until(happened: Callable[[], Any], timeout_s: float = 10) -> None:
    """Return once ``happened()``, which may be a coroutine function, says so."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = happened()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            tick = asyncio.Event()
            asyncio.get_running_loop().call_later(0.01, tick.set)
            await tick.wait()
