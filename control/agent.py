"""The registered process ``agent``: starts and stops groups of ranks here, as the leader says.

==============================================  ==============================================
call ``{start, Leader, Epoch, Spec}``           ``{ok, GroupPid}`` | ``{error, Kind, Text}``
call ``{stop, Leader, Epoch, Id, DrainS}``      ``ok`` once nothing of it is left
call ``{stop, ..., DrainS, GroupPid}``          likewise, of this group alone: another that was
                                                started meanwhile goes on
call ``running``                                list of maps: ``spec, group, epoch``; ``group`` is
                                                ``undefined`` where a former life of the control
                                                process had one whose ports still hold weights
call ``{why, Id}``                              ``{ok, #{alone, ordered, exhausted, epoch,
                                                last_error}}``: how a group came to its end;
                                                ``ordered``: a leader wished it
==============================================  ==============================================

``Epoch`` is the leader's: one that is over is refused (``old_epoch``), by what the ``election`` of
this machine knows when its turn comes. A group lives on its head's machine, under ``instance_sup``,
and outlives the leader. Each order runs in a process of its own, so that this one always answers;
those about one instance come after each other, as they were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from bridge import etf, gen_server
from bridge.errors import DecodeError
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.show import show
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.instance import History, instance_child
from control.instance_spec import InstanceSpec, spec_of, spec_term
from control.names import wait_for_names
from control.rank import RankLimits

log = logging.getLogger("control.agent")

START_S: Final = 120.0
END_S: Final = 5.0  # of an orderly end; then it is killed
ASK_S: Final = 5.0
_OK, _ERROR = Atom("ok"), Atom("error")
_TREE: Final = ("ports", "instance_sup")
Job = Callable[[Process], Awaitable[Term]]


class Agent(GenServer):
    """The leader's hands on this machine.

    Args:
        record_path: JSON file of the groups here; it outlives this process.
    """

    def __init__(self, limits: RankLimits, *, record_path: Path) -> None:
        super().__init__()
        self._limits = limits
        self._record = GroupRecord(record_path)
        self._histories: dict[str, History] = {}  # of groups that were not ended by order
        self._askers: dict[Term, Term] = {}  # job -> who waits for its answer
        self._turns: dict[str, asyncio.Lock] = {}
        self._queued: Counter[str] = Counter()

    def format_state(self) -> Term:
        return {id_: history.epoch for id_, history in self._histories.items()}

    async def init(self, me: Process) -> None:
        me.trap_exit = True  # a job that crashes is no reason to end
        self._record.read()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("start", leader, int(epoch), term):
                try:
                    spec = spec_of(term)
                except ValueError as exc:
                    return (_ERROR, Atom("bad_spec"), str(exc))
                order = self._obey(leader, epoch, spec.id, partial(self._start, spec))
                return self._run(order, from_, f"start {spec.id}")
            case ("stop", leader, int(epoch), id_, int() | float() as drain_s, *group):
                name = text_of(id_)
                job = partial(self._stop, name, float(drain_s), group[0] if group else None)
                return self._run(self._obey(leader, epoch, name, job), from_, f"stop {name}")
            case "running":
                return self._run(self._running, from_, "what runs here")
            case ("why", id_):
                return self._run(partial(self._why, text_of(id_)), from_, f"why {text_of(id_)}")
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("EXIT", job, reason):
                from_ = self._askers.pop(job, None)
                if from_ is not None:  # it crashed
                    text = f"an order ended with {show(reason, 500)}"
                    gen_server.reply(self.me, from_, (_ERROR, Atom("internal_error"), text))
            case _:
                await super().handle_info(message)

    def _run(self, job: Job, from_: Term, label: str) -> Term:
        async def run(me: Process) -> None:
            try:
                answer = await job(me)
            except gen_server.CallError as exc:
                answer = (_ERROR, Atom("internal_error"), f"{label}: {exc}")
            self._askers.pop(me.pid, None)
            gen_server.reply(me, from_, answer)

        self._askers[self.me.spawn(run, link=True, label=label)] = from_
        return NOREPLY

    def _obey(self, leader: Term, epoch: int, id_: str, job: Job) -> Job:
        async def checked(me: Process) -> Term:
            async with self._turn(id_):
                asked: Term = (Atom("obey"), leader, epoch)
                answer = await gen_server.call(me, Atom("election"), asked, timeout_s=ASK_S)
                return await job(me) if answer == "ok" else answer

        return checked

    @contextlib.asynccontextmanager
    async def _turn(self, id_: str) -> AsyncIterator[None]:
        """One at a time, first come, first served."""
        lock = self._turns.setdefault(id_, asyncio.Lock())
        self._queued[id_] += 1
        try:
            async with lock:
                yield
        finally:
            self._queued[id_] -= 1
            if not self._queued[id_]:
                del self._queued[id_], self._turns[id_]

    # -- orders ----------------------------------------------------------------------------

    async def _start(self, spec: InstanceSpec, me: Process) -> Term:
        """Start a group; one of the same id that is another is ended first."""
        if spec.head_node != me.node.name:
            return (_ERROR, Atom("bad_spec"), f"the head of {spec.id} is on {spec.head_node}")
        await wait_for_names(me, _TREE)
        for one in await self._groups(me, only=spec.id):
            if one["spec"] == spec:
                self._histories[spec.id] = one["history"]
                return (_OK, one["group"])
            await self._stop(spec.id, 0.0, None, me)
        history = self._histories[spec.id] = History(epoch=spec.first_epoch)
        self._record.add(spec)
        child = instance_child(spec, history, self._limits)
        start: Term = (Atom("start_child"), child)
        match await gen_server.call(me, Atom("instance_sup"), start, timeout_s=START_S):
            case ("ok", Pid() as group):
                return (_OK, group)
            case other:
                text = history.last_error or show(other, 500)
                return (_ERROR, Atom("start_failed"), f"its processes did not start: {text}")

    async def _stop(self, id_: str, drain_s: float, only: Term, me: Process) -> Term:
        """Let active requests finish for ``drain_s``, then end the group; None: whichever it is."""
        if only is not None and me.node.whereis(f"{id_}_sup") != only:
            return _OK
        self._record.remove(id_)
        coordinator = me.node.whereis(id_)
        if coordinator is not None and drain_s > 0:
            # An error: it is gone, or its clients take longer than they are given.
            with contextlib.suppress(gen_server.CallError):
                await gen_server.call(me, coordinator, Atom("drain"), timeout_s=drain_s)
        group = me.node.whereis(f"{id_}_sup")
        end: Term = (Atom("terminate_child"), Atom(id_))
        try:
            await gen_server.call(me, Atom("instance_sup"), end, timeout_s=END_S)
        except gen_server.CallTimeout:
            # It waits for a port of a machine that is gone, and hears nothing meanwhile.
            if group is not None:
                monitor = me.monitor(group)
                me.exit(group, Atom("kill"))
                with contextlib.suppress(ReceiveTimeout):
                    await me.receive(
                        lambda m: True if m[:2] == ("DOWN", monitor) else None, timeout_s=END_S
                    )
        except gen_server.CallError:
            pass  # instance_sup is ending, and its children with it
        self._histories.pop(id_, None)
        return _OK

    # -- questions -------------------------------------------------------------------------

    async def _running(self, me: Process) -> Term:
        await wait_for_names(me, _TREE)
        found: list[Term] = []
        groups = await self._groups(me)
        for one in groups:
            spec, history = one["spec"], one["history"]
            if spec is None:  # in trouble: ended here, begun anew from the desired state
                async with self._turn(one["id"]):
                    await self._stop(one["id"], 0.0, one["group"], me)
                continue
            self._histories[spec.id] = history
            self._record.add(spec)
            found.append(_row(spec, one["group"], history.epoch))
        running = {one["id"] for one in groups}
        for spec in await self._former(me):
            if spec.id not in running:
                found.append(_row(spec, Atom("undefined"), spec.first_epoch))
        return (_OK, found)

    async def _former(self, me: Process) -> list[InstanceSpec]:
        """Groups of a former life of this process whose ports are still here."""
        if not self._record.former:
            return []
        ports = await gen_server.call(me, Atom("ports"), Atom("ports"), timeout_s=ASK_S)
        held = {text_of(port["instance"]) for port in ports if port["adopted"]}
        return [spec for id_, spec in self._record.former.items() if id_ in held]

    async def _groups(self, me: Process, *, only: str = "") -> list[dict[str, Any]]:
        """Each group, or one; without a spec where its coordinator cannot say what it is."""
        children = await gen_server.call(
            me, Atom("instance_sup"), Atom("which_children"), timeout_s=START_S
        )
        found = []
        for id_, group, _, _ in children:
            name = text_of(id_)
            if not isinstance(group, Pid) or only not in ("", name):
                continue
            row: dict[str, Any] = {"id": name, "group": group, "spec": None, "history": None}
            await wait_for_names(me, (name,), timeout_s=ASK_S)
            with contextlib.suppress(gen_server.CallError):
                books = await gen_server.call(me, Atom(name), Atom("books"), timeout_s=ASK_S)
                row["spec"], row["history"] = books
            found.append(row)
        return found

    async def _why(self, id_: str, me: Process) -> Term:
        """An ending supervisor answers nothing until it is gone: so either way it is found out."""
        async with self._turn(id_):  # an order that ends it is done by then
            ordered = id_ not in self._histories
        history = self._histories.get(id_, History())
        try:
            await gen_server.call(
                me, Atom("instance_sup"), Atom("which_children"), timeout_s=START_S
            )
            alone = True
        except gen_server.CallError:
            alone = False  # it went down with all that instance_sup has
        return (
            _OK,
            {
                Atom("alone"): alone,
                Atom("ordered"): ordered,
                Atom("exhausted"): history.exhausted(),
                Atom("epoch"): history.epoch,
                Atom("last_error"): history.last_error,
            },
        )


def _row(spec: InstanceSpec, group: Term, epoch: int) -> Term:
    return {Atom("spec"): spec_term(spec), Atom("group"): group, Atom("epoch"): epoch}


class GroupRecord:
    """Which groups are here, on disk: what is lost of it costs a reload, not more.

    Attributes:
        former: those of a former life that were not started again yet, by id.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._now: dict[str, InstanceSpec] = {}
        self.former: dict[str, InstanceSpec] = {}

    def read(self) -> None:
        """Take what a former life left."""
        try:
            terms = etf.decode(self._path.read_bytes())
            specs = [spec_of(term) for term in terms] if isinstance(terms, list) else []
            self.former = {spec.id: spec for spec in specs}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, DecodeError) as exc:
            log.warning("cannot read %s: %s; what ran here is placed anew", self._path, exc)

    def add(self, spec: InstanceSpec) -> None:
        """A group starts, or runs."""
        self.former.pop(spec.id, None)
        if self._now.get(spec.id) != spec:
            self._now[spec.id] = spec
            self._write()

    def remove(self, id_: str) -> None:
        """It ends by order."""
        self.former.pop(id_, None)
        if self._now.pop(id_, None) is not None:
            self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_bytes(etf.encode([spec_term(spec) for spec in self._now.values()]))
            temporary.replace(self._path)
        except OSError as exc:
            log.error("cannot write %s: %s", self._path, exc)
