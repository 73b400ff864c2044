"""Coordinator of one running model, and the supervisor spec that ties it to its ranks.

Ranks live and die together (``one_for_all``): when one is lost the coordinator ends too,
and a new generation, the next *epoch*, takes ports, loads and serves. Requests are not
kept here: whoever asked keeps its own journal entry and asks the new epoch to go on.

================================================  ==========================================
call ``{submit, Ref, #{...}}``                    ``{ok, Epoch}`` | ``{error, not_ready, Text}``
call ``describe``                                 the instance's map of CONTRACT section 3
call ``drain``                                    ``ok`` once no request is active
cast ``{progress, Ref}``                          this epoch has served a token
sends ``{instance, Id, State, Pid, Epoch, Text}`` to ``scheduler``
================================================  ==========================================
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import supervisor
from control.names import until_free
from control.rank import Rank, RankLimits
from control.spec import ChildSpec, ChildType, Restart, Strategy, SupSpec

LOAD_S = 1800.0  # a 100 GB model from a slow disk
MAX_EPOCHS_WITHOUT_PROGRESS = 5
PROGRESS_AFTER_S = 30.0  # an epoch that was ready this long counts as progress


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """What to run: one model in one shape. Byte sizes and ranges are the engine's business."""

    id: str
    model: str
    path: Path
    context_tokens: int
    num_slots: int
    threads: int
    device: str
    num_ranks: int = 1
    engine: str = "torch"


@dataclass(slots=True)
class History:
    """What outlives an epoch: it is how a group that never gets anywhere is told from one
    that is killed again and again while it works."""

    epoch: int = 0
    epochs_without_progress: int = 0
    last_error: str = ""

    def note(self, why: str) -> None:
        """Remember what ended the latest epoch."""
        self.last_error = why

    def exhausted(self) -> bool:
        return self.epochs_without_progress >= MAX_EPOCHS_WITHOUT_PROGRESS


class Coordinator(GenServer):
    """Loads the model on its ranks, then lets requests through to rank 0."""

    def __init__(self, spec: InstanceSpec, history: History) -> None:
        super().__init__()
        self.spec, self._history = spec, history
        self.state = "loading"
        self.epoch = 0
        self.ports: list[Pid] = []
        self._facts: list[dict[Any, Term]] = []
        self._active: dict[Ref, Ref] = {}  # monitor of the requester -> its request
        self._drainers: list[Term] = []
        self._ready_s = 0.0

    def format_state(self) -> Term:
        return {
            Atom("id"): self.spec.id,
            Atom("state"): Atom(self.state),
            Atom("epoch"): self.epoch,
            Atom("active_requests"): len(self._active),
        }

    async def init(self, me: Process) -> None:
        self._history.epoch += 1
        self._history.epochs_without_progress += 1
        self.epoch = self._history.epoch
        self.state = "loading" if self.epoch == 1 else "recovering"
        self._tell_scheduler("")
        self.me.spawn(self._load_ranks, link=True, label=f"load {self.spec.id}")

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("submit", Ref() as ref, dict(options)):
                return self._submit(from_[0], ref, options)
            case "describe":
                return await self._describe()
            case "books":  # local only: the scheduler takes over after its own restart
                return (self.spec, self._history)
            case "drain":
                self.state = "draining"
                self._drainers.append(from_)
                self._end_drain()
                return NOREPLY
            case _:
                return await super().handle_call(request, from_)

    async def handle_cast(self, request: Term) -> None:
        match request:
            case ("progress", Ref()):
                self._history.epochs_without_progress = 0
            case _:
                await super().handle_cast(request)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("loaded", list(ports), list(facts)):
                self.ports, self._facts = ports, facts
                self._ready_s = time.monotonic()
                if self.state != "draining":
                    self.state = "ready"
                self._tell_scheduler("")
            case ("load_failed", kind, text):
                self._history.last_error = text_of(text)
                self.state = "failed"
                self._tell_scheduler(f"{kind}: {text_of(text)}")
            case "announce":
                self._tell_scheduler("")
            case ("DOWN", Ref() as monitor, _, _, _):
                self._active.pop(monitor, None)
                self._end_drain()
            case _:
                await super().handle_info(message)

    async def terminate(self, reason: Term) -> None:
        if self._ready_s and time.monotonic() - self._ready_s > PROGRESS_AFTER_S:
            self._history.epochs_without_progress = 0

    # -- requests --------------------------------------------------------------------------

    def _submit(self, requester: Pid, ref: Ref, options: dict[Any, Term]) -> Term:
        if self.state != "ready":
            return (Atom("error"), Atom("not_ready"), f"instance {self.spec.id} is {self.state}")
        self._active[self.me.monitor(requester)] = ref
        gen_server.cast(self.me, self.ports[0], (Atom("submit"), requester, ref, options))
        return (Atom("ok"), self.epoch)

    def _end_drain(self) -> None:
        if self.state == "draining" and not self._active:
            for waiting in self._drainers:
                gen_server.reply(self.me, waiting, Atom("ok"))
            self._drainers.clear()

    # -- loading ---------------------------------------------------------------------------

    async def _load_ranks(self, me: Process) -> None:
        """Ask every rank's port to load; all of them at once, since collectives meet in it."""
        ports: list[Pid] = []
        for rank in range(self.spec.num_ranks):
            facts = await gen_server.call(me, rank_name(self.spec.id, rank), Atom("describe"))
            ports.append(facts["port"])
        answers = await asyncio.gather(
            *(
                gen_server.node_call(
                    me.node, port, (Atom("load"), self._order(rank)), timeout_s=LOAD_S
                )
                for rank, port in enumerate(ports)
            )
        )
        found = []
        for answer in answers:
            match answer:
                case ("ok", dict(facts)):
                    found.append(facts)
                case ("error", kind, text):
                    me.send(self.me.pid, (Atom("load_failed"), kind, text))
                    return
        me.send(self.me.pid, (Atom("loaded"), ports, found))

    def _order(self, rank: int) -> dict[Any, Term]:
        spec = self.spec
        return {
            Atom("instance"): spec.id,
            Atom("epoch"): self.epoch,
            Atom("rank"): rank,
            Atom("world_size"): spec.num_ranks,
            Atom("path"): str(spec.path),
            Atom("context_tokens"): spec.context_tokens,
            Atom("num_slots"): spec.num_slots,
            Atom("threads"): spec.threads,
            Atom("device"): spec.device,
        }

    # -- what others see -------------------------------------------------------------------

    def _tell_scheduler(self, text: str) -> None:
        self.me.send(
            Atom("scheduler"),
            (Atom("instance"), self.spec.id, Atom(self.state), self.me.pid, self.epoch, text),
        )

    async def _describe(self) -> dict[Any, Term]:
        return {
            **describe_spec(self.spec),
            Atom("state"): Atom(self.state),
            Atom("epoch"): self.epoch,
            Atom("restarts"): self.epoch - 1,
            Atom("active_requests"): len(self._active),
            Atom("ranks"): [await self._describe_rank(r) for r in range(self.spec.num_ranks)],
        }

    async def _describe_rank(self, rank: int) -> dict[Any, Term]:
        known = await gen_server.call(
            self.me, rank_name(self.spec.id, rank), Atom("describe"), timeout_s=1.0
        )
        facts = self._facts[rank] if rank < len(self._facts) else {}
        rows = {
            Atom("rank"): rank,
            Atom("node"): self.me.node.name,
            Atom("os_pid"): known["os_pid"],
            Atom("state"): Atom(self.state),
            Atom("device"): facts.get("device", self.spec.device or "cpu:0"),
            Atom("kernels"): facts.get("kernels", Atom("undefined")),
            Atom("layers"): facts.get("layers", []),
            Atom("kv_heads"): facts.get("kv_heads", []),
            Atom("memory_bytes"): known["memory_bytes"],
        }
        if known["load_total"]:
            rows[Atom("load_done")] = known["load_done"]
            rows[Atom("load_total")] = known["load_total"]
        return rows


def describe_spec(spec: InstanceSpec) -> dict[Any, Term]:
    """The part of an instance's map that does not change while it lives."""
    return {
        Atom("id"): spec.id,
        Atom("model"): spec.model,
        Atom("strategy"): Atom("single" if spec.num_ranks == 1 else "tensor"),
        Atom("tensor_size"): spec.num_ranks,
        Atom("pipeline_size"): 1,
        Atom("engine"): spec.engine,
    }


def rank_name(instance: str, rank: int) -> Atom:
    """Registered name of a rank's process, for whoever wants to look inside."""
    return Atom(f"{instance}_rank{rank}")


def instance_child(spec: InstanceSpec, history: History, limits: RankLimits) -> ChildSpec:
    """Child spec of ``instance_N_sup``: the ranks, then their coordinator, all or none."""

    async def start_rank(rank: int, me: Process) -> Pid:
        if history.exhausted():
            raise gen_server.StartError(
                (
                    Atom("restart_budget_spent"),
                    f"{history.epochs_without_progress} epochs of {spec.id} ended without a token",
                )
            )
        await until_free(me, rank_name(spec.id, rank))
        server = Rank(spec.id, rank, limits, on_lost=history.note)
        return await gen_server.start_link(
            me, server, name=rank_name(spec.id, rank), timeout_s=limits.lease_s + 5
        )

    async def start_coordinator(me: Process) -> Pid:
        await until_free(me, spec.id)
        return await gen_server.start_link(me, Coordinator(spec, history), name=Atom(spec.id))

    children = tuple(
        ChildSpec(
            id=Atom(f"rank{rank}"),
            start=partial(start_rank, rank),
            restart=Restart.PERMANENT,
            shutdown_s=10.0,
            modules=("control.rank",),
        )
        for rank in range(spec.num_ranks)
    )
    coordinator = ChildSpec(id=Atom("coordinator"), start=start_coordinator, shutdown_s=5.0)
    group = SupSpec(
        strategy=Strategy.ONE_FOR_ALL,
        intensity=5,
        period_s=1,  # only a start that fails at once trips it; History counts the rest
        children=(*children, coordinator),
    )

    async def start_group(me: Process) -> Pid:
        await until_free(me, f"{spec.id}_sup")
        return await supervisor.start_link(me, group, name=Atom(f"{spec.id}_sup"))

    return ChildSpec(
        id=Atom(spec.id),
        start=start_group,
        restart=Restart.TEMPORARY,
        type=ChildType.SUPERVISOR,
    )
