"""Coordinator of one running model, and the supervisor spec that ties it to its ranks.

Ranks live and die together (``one_for_all``): when one is lost the coordinator ends too,
and a new generation, the next *epoch*, takes ports, loads and serves. Requests are not
kept here: whoever asked keeps its own journal entry and asks the new epoch to go on.

================================================  ==========================================
call ``{submit, Ref, #{...}}``                    ``{ok, Epoch, Port}`` | ``{error, Kind, Text}``
call ``describe``                                 the instance's map of CONTRACT section 3
call ``idle``                                     seconds since its last request ended, or 0.0
call ``drain``                                    ``ok`` once no request is active
cast ``{progress, Ref}``                          this epoch has served a token
info ``announce`` | ``{announce, Pid}``           says its state to all, or to that pid's
                                                  ``scheduler`` alone
sends ``{instance, Id, State, Pid, Epoch, Text,   to ``scheduler`` of this node and of every
#{model => Model}}``                              connected one
================================================  ==========================================

It runs on the machine of the head rank; other ranks may be of other machines. A request may come
from any node: the head's port is made to dial it first, since tokens go there straight. ``submit``
is then refused as ``unreachable`` where it cannot. Its answer names the port, so that the requester
can watch the link by which its tokens come.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.process_errors import Exit
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import supervisor
from control.history import History
from control.instance_spec import InstanceSpec, describe_spec, layout_of, rank_name
from control.instance_view import describe_rank, engine_of
from control.load_ranks import LoadFailed, load_ranks
from control.names import until_free
from control.rank import Rank, RankLimits
from control.rank_lease import Want, dial
from control.spec import ChildSpec, ChildType, Restart, Strategy, SupSpec
from models.mesh import head_rank

__all__ = ["Coordinator", "History", "instance_child"]

PROGRESS_AFTER_S = 30.0  # an epoch that was ready this long counts as progress


class Coordinator(GenServer):
    """Loads the model on its ranks, then lets requests through to their head."""

    def __init__(self, spec: InstanceSpec, history: History, *, lease_s: float) -> None:
        super().__init__()
        self.spec, self._history, self._lease_s = spec, history, lease_s
        self.state = "loading"
        self.epoch = 0
        self.ports: list[Pid] = []
        self._facts: list[dict[Any, Term]] = []
        self._active: dict[Ref, Ref] = {}  # monitor of the requester -> its request
        self._drainers: list[Term] = []
        self._ready_s = 0.0
        self._used_s = time.monotonic()  # when its last request ended

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
        self._tell_schedulers("")
        self.me.spawn(self._load_ranks, link=True, label=f"load {self.spec.id}")

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("submit", Ref() as ref, dict(options)):
                return self._submit(from_, ref, options)
            case "describe":
                return await self._describe()
            case "books":  # local only: the scheduler takes over after its own restart
                return (self.spec, self._history)
            case "idle":
                return 0.0 if self._active else time.monotonic() - self._used_s
            case "drain":
                if self.state != "draining":
                    self.state = "draining"
                    self._tell_schedulers("")  # nobody is sent here any more
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
                self._tell_schedulers("")
            case ("load_failed", kind, text):
                self._history.last_error = text_of(text)
                self.state = "failed"
                self._tell_schedulers(f"{kind}: {text_of(text)}")
            case "announce":
                self._tell_schedulers("")
            case ("announce", Pid() as asker):
                self._tell_scheduler(str(asker.node), "")
            case ("DOWN", Ref() as monitor, _, Pid() as requester, _):
                self._forget(monitor, requester)
            case _:
                await super().handle_info(message)

    async def terminate(self, reason: Term) -> None:
        if self._ready_s and time.monotonic() - self._ready_s > PROGRESS_AFTER_S:
            self._history.epochs_without_progress = 0

    # -- requests --------------------------------------------------------------------------

    def _submit(self, from_: Term, ref: Ref, options: dict[Any, Term]) -> Term:
        if self.state != "ready":
            return (Atom("error"), Atom("not_ready"), f"instance {self.spec.id} is {self.state}")
        requester: Pid = from_[0]
        self._active[self.me.monitor(requester)] = ref
        order: Term = (Atom("submit"), requester, ref, options)
        done: Term = (Atom("ok"), self.epoch, self._head)
        if requester.node == self.me.node.name:
            gen_server.cast(self.me, self._head, order)
            return done

        async def submit(me: Process) -> None:
            answer = await dial(me, self._head, str(requester.node))
            if answer == "ok":
                gen_server.cast(me, self._head, order)
            gen_server.reply(me, from_, done if answer == "ok" else answer)

        self.me.spawn(submit, link=True, label=f"submit from {requester.node}")
        return NOREPLY

    @property
    def _head(self) -> Pid:
        """Port of the rank that plans and samples."""
        return self.ports[head_rank(self.spec.shape.tensor, self.spec.shape.pipeline)]

    def _forget(self, monitor: Ref, requester: Pid) -> None:
        """A requester ended. A port hears so itself, but late where a machine just vanished."""
        ref = self._active.pop(monitor, None)
        self._used_s = time.monotonic()
        if ref is not None and requester.node != self.me.node.name:
            gen_server.cast(self.me, self._head, (Atom("cancel"), ref))
        self._end_drain()

    def _end_drain(self) -> None:
        if self.state == "draining" and not self._active:
            for waiting in self._drainers:
                gen_server.reply(self.me, waiting, Atom("ok"))
            self._drainers.clear()

    # -- loading ---------------------------------------------------------------------------

    async def _load_ranks(self, me: Process) -> None:
        """Load every rank's part. Ends with the coordinator when one of them is lost."""
        try:
            ports: list[Pid] = []
            for rank in range(self.spec.num_ranks):
                ports.append(await self._port_of(me, rank))
            facts = await load_ranks(me, self.spec, self.epoch, ports)
        except LoadFailed as exc:
            me.send(self.me.pid, (Atom("load_failed"), Atom(exc.kind), exc.text))
        except Exit as exc:
            if not self._history.last_error:  # a lost rank said it better
                self._history.note(show(exc.reason, 500))
            raise
        else:
            me.send(self.me.pid, (Atom("loaded"), ports, facts))

    async def _port_of(self, me: Process, rank: int) -> Pid:
        """The port of a rank, once it has one."""
        try:
            answer = await gen_server.call(
                me, rank_name(self.spec.id, rank), Atom("port"), timeout_s=self._lease_s + 5
            )
        except gen_server.CallError as exc:
            raise Exit((Atom("port_lost"), str(exc))) from None
        port: Pid = answer[1]
        return port

    # -- what others see -------------------------------------------------------------------

    def _tell_schedulers(self, text: str) -> None:
        """Every node may be asked who serves a model, so every one is told."""
        for node in (self.me.node.name, *self.me.node.nodes()):
            self._tell_scheduler(str(node), text)

    def _tell_scheduler(self, node: str, text: str) -> None:
        state = (Atom(self.state), self.me.pid, self.epoch, text)
        more: Term = {
            Atom("model"): self.spec.model,
            Atom("context_tokens"): self.spec.context_tokens,
        }
        to = Atom("scheduler") if node == self.me.node.name else (Atom("scheduler"), Atom(node))
        self.me.send(to, (Atom("instance"), self.spec.id, *state, more))

    async def _describe(self) -> dict[Any, Term]:
        ranks = [await self._describe_rank(rank) for rank in range(self.spec.num_ranks)]
        known = describe_spec(self.spec)
        if self._facts:
            known[Atom("engine")] = engine_of(self._facts[0], self.spec.engine)
        return {
            **known,
            Atom("state"): Atom(self.state),
            Atom("epoch"): self.epoch,
            Atom("restarts"): self.epoch - 1,
            Atom("active_requests"): len(self._active),
            Atom("ranks"): ranks,
        }

    async def _describe_rank(self, rank: int) -> dict[Any, Term]:
        known = await gen_server.call(
            self.me, rank_name(self.spec.id, rank), Atom("describe"), timeout_s=1.0
        )
        facts = self._facts[rank] if rank < len(self._facts) else {}
        return describe_rank(self.spec, rank, self.state, known, facts)


def instance_child(spec: InstanceSpec, history: History, limits: RankLimits) -> ChildSpec:
    """Child spec of ``instance_N_sup``: the ranks, then their coordinator, all or none."""

    first, layout = history.epoch, layout_of(spec)

    async def start_rank(rank: int, me: Process) -> Pid:
        if history.exhausted():
            raise gen_server.StartError(
                (
                    Atom("restart_budget_spent"),
                    f"{history.epochs_without_progress} epochs of {spec.id} ended without a token",
                )
            )
        await until_free(me, rank_name(spec.id, rank))
        want = Want(
            instance=spec.id,
            rank=rank,
            node=spec.ranks[rank].node,
            layout=layout,
            placement=spec.first_epoch,
            fresh=history.epoch > first,  # what an epoch that failed has left is not wanted
            spans=len(spec.nodes) > 1,
        )
        server = Rank(want, limits, on_lost=history.note)
        return await gen_server.start_link(me, server, name=rank_name(spec.id, rank))

    async def start_coordinator(me: Process) -> Pid:
        await until_free(me, spec.id)
        server = Coordinator(spec, history, lease_s=limits.lease_s)
        return await gen_server.start_link(me, server, name=Atom(spec.id))

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
