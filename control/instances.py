"""Life of the instances of a node: brought up, changing state, failing, gone.

The scheduler's hands: what it hears of its helpers and of coordinators ends in a method here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bridge import gen_server
from bridge.gen_server import NOREPLY
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from control import bring_up
from control.books import Books, Record
from control.desired import DesiredFile, Wanted
from control.errors import ControlError, NotReady
from control.events import publish
from control.instance_spec import InstanceSpec
from control.lookup import Lookup, Resolved
from control.machine import Machine
from control.placement_request import Defaults, Host, host_of
from control.rank import RankLimits
from control.reconcile import Running, reconcile

log = logging.getLogger("control.scheduler")

DRAIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On what terms models run on this machine.

    Attributes:
        refuse: why none may run at all (the machine's roles), or empty.
    """

    defaults: Defaults
    limits: RankLimits
    machine: Callable[[], Machine]
    refuse: str = ""


class Instances:
    """Records and the processes behind them.

    Args:
        me: the scheduler's process: helpers are linked to it and report to it.
        on_change: called when an answer for those who wait may have changed.
        on_demand_failed: told model and reason when a load that a request began came to nothing.
    """

    def __init__(
        self,
        me: Process,
        books: Books,
        desired: DesiredFile,
        lookup: Lookup,
        terms: Terms,
        *,
        on_change: Callable[[], None],
        on_demand_failed: Callable[[str, str], None],
    ) -> None:
        self._me, self._books, self._desired = me, books, desired
        self._lookup, self._terms = lookup, terms
        self._on_change, self._on_demand_failed = on_change, on_demand_failed
        self.stopping = False  # from then on groups end by no fault of theirs

    def begin(self, record: Record, resolved: Resolved) -> Record:
        """Bring ``record`` up; one without an id gets a new one."""
        options = record.wanted.options
        if not record.id:
            record.id = self._books.new_id(resolved.id, self._desired.now)
            record.wanted = Wanted(record.id, record.wanted.model, options)
        self._books.add(record)
        self._change(record, "pulling")
        plan = bring_up.Plan(
            id=record.id,
            model=resolved.id,
            ref=record.wanted.model,
            options=options,
            defaults=self._terms.defaults,
            host=self.host(record.id),
        )
        record.worker = self._me.spawn(
            lambda me: bring_up.bring_up(
                me, plan, history=record.history, limits=self._terms.limits, books=self._me.pid
            ),
            link=True,
            label=f"bring up {record.id}",
        )
        return record

    def host(self, id_: str = "") -> Host:
        """This machine, less what instances other than ``id_`` take of it."""
        return host_of(
            str(self._me.node.name), self._terms.machine(), self._books.memory_bytes(id_)
        )

    def _begin_again(self, record: Record) -> None:
        """Bring up what should run but does not."""
        try:
            if self._terms.refuse:
                raise NotReady(record.model, self._terms.refuse, kind="no_compute")
            resolved = self._lookup.resolve(record.wanted.model)
        except ControlError as exc:
            self._fail(record, str(exc))
        else:
            record.model = resolved.id
            self.begin(record, resolved)

    def on_prepared(self, id_: str, spec: InstanceSpec) -> None:
        """It is placed: its group starts."""
        record = self._books.get(id_)
        if record is not None and record.state != "draining":  # else unloaded a moment ago
            record.spec = spec
            self._change(record, "loading")
            self._answer_load(record, (Atom("ok"), id_))

    def on_started(self, id_: str, group: Pid) -> None:
        """The supervisor of its group is there."""
        if record := self._books.get(id_):
            record.group = self._me.monitor(group)

    def on_failed(self, id_: str, kind: str, text: str) -> None:
        """It came to nothing, or ended for good."""
        record = self._books.get(id_)
        if record is None or record.state == "draining":
            return
        if record.on_demand and not record.ever_ready:
            self._forget_demand(record, text)
        elif record.reply_to is not None and record.spec is None:
            self._books.remove(id_)  # told to the caller: nothing is left over
            self._desired.save(self._desired.now.remove(id_))
            self._change(record, "unloaded", text)
            self._answer_load(record, (Atom("error"), Atom(kind), text))
        else:
            self._fail(record, text)
        self._on_change()

    def _forget_demand(self, record: Record, text: str) -> None:
        """A load on demand failed: its askers are told, the next one after a while tries again."""
        self._on_demand_failed(record.model, text)
        self._take_down(record)
        self._books.remove(record.id)
        self._change(record, "unloaded", text)

    def _answer_load(self, record: Record, answer: Term) -> None:
        if record.reply_to is not None:
            gen_server.reply(self._me, record.reply_to, answer)
            record.reply_to = None

    def _change(self, record: Record, state: str, text: str = "") -> None:
        """A new state, and word of it to whoever listens."""
        record.state, record.text = state, text
        publish(
            self._me,
            "instance",
            {
                Atom("id"): record.id,
                Atom("model"): record.model,
                Atom("state"): Atom(state),
                Atom("epoch"): record.epoch,
                Atom("text"): text,
            },
        )

    def on_instance(self, id_: str, state: str, pid: Pid, epoch: int, text: str) -> None:
        """Word of its coordinator."""
        record = self._books.get(id_)
        if record is None or epoch < record.epoch or record.state in ("draining", "failed"):
            return
        if record.coordinator != pid:
            if record.watch is not None:
                self._me.demonitor(record.watch)
            record.coordinator, record.watch = pid, self._me.monitor(pid)
        record.epoch = epoch
        if state == "failed":
            self.on_failed(id_, "load_failed", text)
            return
        record.ever_ready = record.ever_ready or state == "ready"
        self._change(record, state, text)
        self._on_change()

    def on_down(self, monitor: Ref, reason: Term) -> None:
        """A coordinator ended (the next epoch comes), or a whole group."""
        if record := self._books.first(lambda r: r.watch == monitor):
            record.coordinator = record.watch = None
            if record.state == "ready":  # nobody is sent to a server that is gone
                self._change(record, "recovering")
        elif record := self._books.first(lambda r: r.group == monitor):
            record.group = None
            if record.state not in ("draining", "failed") and not self.stopping:
                self._change(record, "recovering")
                why = partial(self._find_out, record.id, reason)
                self._me.spawn(why, link=True, label=f"why {record.id} is down")

    async def _find_out(self, id_: str, reason: Term, me: Process) -> None:
        """Whether a group ended alone, its budget spent, or went down with ``instance_sup``."""
        alone = await bring_up.is_supervisor_up(me)
        me.send(self._me.pid, (Atom("group_down"), id_, alone, reason))

    def on_group_judged(self, id_: str, alone: bool, reason: Term) -> None:
        """Its group ended: a budget spent, or ``instance_sup`` going down with all it has."""
        record = self._books.get(id_)
        if record is None or record.state in ("draining", "failed") or self.stopping:
            return
        if alone:
            why = f"its supervisor ended with {show(reason)}"
            if record.history.exhausted():
                why = f"restart budget spent after {record.epoch} epochs"
            last = record.history.last_error
            text = f"{why}; last error: {last}" if last else why
            self.on_failed(id_, "restart_budget_spent", text)
        else:
            log.warning("instance %s went down with instance_sup; it starts again", id_)
            self._begin_again(record)
            self._on_change()

    def _fail(self, record: Record, text: str) -> None:
        log.error("instance %s failed: %s", record.id, text)
        record.coordinator = None
        self._books.add(record)
        self._change(record, "failed", text)
        self._take_down(record)
        if not record.ever_ready and record.epoch <= 1:  # it never worked: not again by itself
            self._desired.save(self._desired.now.remove(record.id))

    def _take_down(self, record: Record) -> None:
        """End what is left of an instance's processes."""
        if record.group is not None or record.spec is not None:
            self._me.spawn(
                lambda me: bring_up.take_down(me, record.id, None, 0.0, self._me.pid),
                link=True,
                label=f"end {record.id}",
            )

    def on_worker_exit(self, pid: Term, reason: Term) -> None:
        """A helper ended; one that crashed has told nobody why."""
        record = self._books.first(lambda r: r.worker == pid)
        if record is not None:
            record.worker = None
            if reason not in ("normal", "killed") and record.state in ("pulling", "loading"):
                self.on_failed(record.id, "internal_error", f"bringing it up: {show(reason, 500)}")

    def unload(self, id_: str, from_: Term) -> Term:
        """Drain, then end; ``from_`` (or nobody: None) is answered when it is gone."""
        record = self._books.get(id_)
        if record is None:
            running = ", ".join(self._books.ids()) or "none"
            return (Atom("error"), Atom("not_found"), f"no instance {id_!r}; running: {running}")
        self._desired.save(self._desired.now.remove(id_))
        if record.state == "draining":
            record.leavers.append(from_)
            return NOREPLY
        if record.reply_to is not None:
            self._answer_load(record, (Atom("error"), Atom("unloaded"), f"{id_} was unloaded"))
        if record.worker is not None:
            self._me.exit(record.worker, Atom("kill"))
        record.leavers.append(from_)
        self._change(record, "draining")
        coordinator = record.coordinator
        record.worker = self._me.spawn(
            lambda me: bring_up.take_down(me, id_, coordinator, DRAIN_S, self._me.pid),
            link=True,
            label=f"take down {id_}",
        )
        self._on_change()
        return NOREPLY

    def on_stopped(self, id_: str) -> None:
        """Nothing of it is left."""
        record = self._books.get(id_)
        if record is not None and record.state == "draining":
            self._books.remove(id_)
            self._change(record, "unloaded")
            for from_ in record.leavers:
                if from_ is not None:
                    gen_server.reply(self._me, from_, Atom("ok"))
        self._on_change()

    def take_over(self, running: Sequence[Running]) -> None:
        """After a restart of the scheduler: keep what runs, start what should run but does not."""
        kept, missing = reconcile(running, self._desired.now)
        for record, group in kept:
            record.group = self._me.monitor(group)
            self._books.add(record)
            self._me.send(Atom(record.id), Atom("announce"))
        for record in missing:
            self._begin_again(record)
