"""The leader's part of a scheduler: its books, what may be asked of it, and what it hears.

Another node has none of this in use. Nothing is placed before the desired state says so on a
quorum's disks, and before every machine that is up was asked what it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, Final

from bridge import gen_server
from bridge.gen_server import NOREPLY
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import group_orders, place_question
from control.books import Books, Record
from control.desired import Desired, Wanted, desired_of
from control.desired_state import DesiredState
from control.desired_sync import Document
from control.instance_spec import InstanceSpec
from control.instances import Instances
from control.keys import key_of
from control.load_options import BadOption, LoadOptions
from control.lookup import Lookup
from control.moves import STABLE_S
from control.placement_request import Defaults
from control.quorum import Roster
from control.reconcile import Running, reconcile
from control.regrow import weigh
from control.routes import Routes

log = logging.getLogger("control.scheduler")

SETTLE_S: Final = 5.0  # after an election, for machines that are still starting
_OK, _ERROR = Atom("ok"), Atom("error")


class Leading:
    """What the leader does.

    Args:
        me: the scheduler's process: helpers are linked to it and report to it.
        routes: whose ids are taken.
        up: the other machines that are.
        now_s: a clock.
        on_open: the books are open.
        on_change, on_demand_failed: as of ``Instances``.

    Attributes:
        complete: whether the books are open: orders are taken.
    """

    def __init__(
        self,
        me: Process,
        books: Books,
        desired: DesiredState,
        routes: Routes,
        lookup: Lookup,
        defaults: Defaults,
        *,
        up: Collection[str],
        now_s: Callable[[], float],
        on_open: Callable[[], None],
        on_change: Callable[[], None],
        on_demand_failed: Callable[[str, str], None],
    ) -> None:
        self._me, self._books, self._desired, self._routes = me, books, desired, routes
        self._lookup, self._defaults = lookup, defaults
        self._up, self._now_s, self._on_open = up, now_s, on_open
        self._node = str(me.node.name)
        self._epoch, self._roster = 0, Roster("", (0, 0), ())
        self._went_s: dict[str, float] = {}  # when machines went
        self.complete = False
        self._reconsiders = False  # soon
        self.instances = Instances(
            me,
            books,
            desired,
            lookup,
            defaults,
            up=self._machines,
            now_s=now_s,
            on_change=on_change,
            on_demand_failed=on_demand_failed,
        )

    def _machines(self) -> Collection[str]:
        return {*self._up, self._node}

    @property
    def alone(self) -> bool:
        """Whether nobody else is of this cluster."""
        return self._roster.everyone <= {self._node} and not self._up

    def _spawn(self, body: Callable[[Process], Any], label: str) -> None:
        self._me.spawn(body, link=True, label=label)

    # -- orders ----------------------------------------------------------------------------

    def handle(self, request: Term, from_: Term) -> Term:
        """Answer an order or a question. Raises ControlError."""
        desired = self._desired.now
        match request:
            case ("load", model, dict(options)):
                return self._load(text_of(model), LoadOptions.from_term(options), from_)
            case ("place", model, dict(options)):
                return self._place(text_of(model), LoadOptions.from_term(options), from_)
            case ("unload", instance):
                return self.instances.unload(text_of(instance), from_)
            case ("set_default", model):
                id_ = self.instances.resolve(text_of(model))
                return self._save(desired.with_default(id_), from_)
            case ("replace_default", old, new):
                if desired.default != text_of(old):
                    return _OK
                id_ = self.instances.resolve(text_of(new))
                return self._save(desired.with_default(id_), from_)
            case ("add_key", record):
                return self._save(desired.add_key(key_of(record)), from_)
            case ("revoke_key", id_):
                return self._save(desired.revoke_key(text_of(id_)), from_)
            case "instances":
                return [(r.coordinator or Atom("undefined"), r.describe()) for r in self._books]
            case _:
                return (_ERROR, Atom("unknown_call"), f"scheduler: {show(request)}")

    def _save(self, desired: Desired, from_: Term) -> Term:
        """Change the document; ``from_`` is answered when that counts."""

        def saved(committed: bool) -> None:
            gen_server.reply(self._me, from_, _OK if committed else _leader_changed())

        self._desired.save(desired, saved)
        return NOREPLY

    def _load(self, ref: str, options: LoadOptions, from_: Term) -> Term:
        model = self.instances.resolve(ref)
        single = replace(options, replicas=0)
        records: list[Record] = []
        desired = self._desired.now
        for _ in range(max(1, options.replicas)):
            id_ = self._new_id(model, desired)
            record = Record(id_, model, Wanted(id_, model, single))
            desired = desired.add(record.wanted)
            records.append(record)
        desired = replace(desired, version=self._desired.now.version + 1)
        records[0].reply_to = from_

        def saved(committed: bool) -> None:
            if not committed:
                gen_server.reply(self._me, from_, _leader_changed())
                return
            for record in records:
                self.instances.begin(record)

        self._desired.save(desired, saved)
        return NOREPLY

    def load_on_demand(self, name: str) -> None:
        """Bring up a model that a request names. Raises UnknownModel."""
        model = self._lookup.card_of(name)
        id_ = self._new_id(model, self._desired.now)
        self.instances.begin(Record(id_, model, Wanted(id_, model), on_demand=True))

    def _new_id(self, model: str, desired: Desired) -> str:
        return self._books.new_id(model, desired, (route.id for route in self._routes))

    def _place(self, ref: str, options: LoadOptions, from_: Term) -> Term:
        question = place_question.Question(
            model=self.instances.resolve(ref),
            lookup=self._lookup,
            options=options,
            defaults=self._defaults,
            used=self._books.used(),
        )
        self._spawn(partial(place_question.answer, question, from_), f"place {ref}")
        return NOREPLY

    def forget_all(self) -> None:
        """Nothing is wanted any more; of a machine alone."""
        if self.complete and self.alone:
            for record in self._books:
                self.instances.unload(record.id, None)
            self._desired.save(self._desired.now.without_models())

    def on_wishes(self, document: Document, taken: Callable[[], None]) -> None:
        """What a cluster wanted that has become part of this one; it mostly runs already.

        Args:
            taken: called when that outlives this leader, or cannot be read at all.
        """
        try:
            merged = self._desired.now.merged(desired_of(document))
        except (ValueError, BadOption) as exc:
            log.error("the desired state of a machine that joined cannot be read: %s", exc)
            taken()
            return
        if merged is self._desired.now:
            if not self._desired.busy:  # else it may be what is being saved
                taken()
            return
        self._desired.save(merged, lambda committed: taken() if committed else None)
        wanted_of = {wanted.id: wanted for wanted in merged.wanted}
        for record in self._books:
            if record.on_demand and record.id in wanted_of:
                record.on_demand, record.wanted = False, wanted_of[record.id]
        self._me.send_after(SETTLE_S, self._me.pid, (Atom("settled"), self._epoch))

    # -- messages --------------------------------------------------------------------------

    def take(self, message: Term) -> bool:
        """Word of a helper; False where it is something else."""
        instances = self.instances
        match message:
            case ("worker", Pid() as worker, (str(), str(id_), *_) as word):
                if instances.works(worker, id_):
                    self._hear_worker(word)
            case ("group_down", str(id_), known, reason):
                instances.on_group_judged(id_, known, reason)
            case ("stopped", str(id_)):
                instances.on_stopped(id_)
            case ("move", str(id_), why):
                self._move(id_, text_of(why))
            case ("better", str(id_), text):
                self._better(id_, text_of(text))
            case ("retry", str(id_)) if self.complete:
                instances.retry_failed(id_)
            case ("stock", int(epoch), list(running), list(answered)):
                self._on_stock(epoch, running, {text_of(node) for node in answered})
            case ("joined", node, list(running)):
                self._on_joined(text_of(node), running)
            case ("lost", node):
                if self.complete and text_of(node) not in self._up:
                    instances.on_lost(text_of(node))
            case ("settled", int(epoch)):
                self._begin_missing(epoch)
            case ("reconsider",):
                self._reconsider()
            case ("retry", _):
                pass  # of a leader that was
            case _:
                return False
        return True

    def _hear_worker(self, word: Term) -> None:
        instances = self.instances
        match word:
            case ("fetching", str(id_)):
                instances.on_fetching(id_)
            case ("placed", str(id_), dict(taken)):
                instances.on_placed(id_, taken)
            case ("prepared", str(id_), InstanceSpec() as spec):
                instances.on_prepared(id_, spec)
            case ("started", str(id_), Pid() as group):
                instances.on_started(id_, group)
            case ("failed", str(id_), kind, text):
                instances.on_failed(id_, str(kind), text_of(text))
            case ("make_room", str(id_), list(others)):
                instances.on_make_room(id_, others)

    def on_instance(self, id_: str, state: str, pid: Pid, epoch: int, text: str) -> None:
        """Word of a coordinator; of one that the books do not have there, its machine is asked."""
        record = self._books.get(id_)
        known = record is not None and (record.spec is None or record.spec.head_node == pid.node)
        if not known and pid.node in self._machines():
            self._welcome(str(pid.node))
        self.instances.on_instance(id_, state, pid, epoch, text)

    def on_down(self, monitor: Ref, reason: Term) -> None:
        """A monitor that is no route's."""
        self.instances.on_group_down(monitor, reason)

    # -- machines --------------------------------------------------------------------------

    def node_up(self, node: str) -> None:
        """A machine came: what does it run?"""
        self.instances.moves.note_up(node, self._now_s())
        if self.complete:
            self._welcome(node)

    def node_down(self, node: str) -> None:
        """A machine went: for good?"""
        self.instances.moves.note_down(node)
        self._went_s[node] = self._now_s()
        if self.complete:
            self._judge(node)

    def _welcome(self, node: str) -> None:
        work = partial(group_orders.welcome, node=node, books=self._me.pid)
        self._spawn(work, f"what runs on {node}")

    def _judge(self, node: str) -> None:
        work = partial(group_orders.judge, node=node, books=self._me.pid)
        self._spawn(work, f"is {node} gone")

    def _on_joined(self, node: str, running: list[Running]) -> None:
        if not self.complete or node not in self._machines():
            return
        known = {record.id: record for record in self._books}
        self.instances.take_up(reconcile(running, self._desired.now, known))
        self.instances.on_joined(node, running)
        self.instances.retry_failed()
        self._reconsider_in(STABLE_S)

    # -- beginning and ending to lead ------------------------------------------------------

    def lead(self, epoch: int, roster: Roster) -> None:
        """This node has authority for ``epoch``."""
        self._epoch, self._roster = epoch, roster

    def on_ready(self) -> None:
        """The desired state is known; now what runs."""
        if not self.complete:
            nodes, books = sorted(self._machines()), self._me.pid
            work = partial(group_orders.take_stock, epoch=self._epoch, nodes=nodes, books=books)
            self._spawn(work, "take stock")

    def step_down(self, why: str) -> None:
        """Another leads: the books are its own now."""
        if self._epoch:
            self.instances.drop_all(why)
        self._epoch, self.complete = 0, False

    def _on_stock(self, epoch: int, running: list[Running], answered: set[str]) -> None:
        """The books are opened with what runs on the machines that ``answered``."""
        if not self._epoch or self.complete:
            return
        if epoch != self._epoch:  # a newer epoch of this node: as things are now
            if self._desired.ready:
                self.on_ready()
            return
        self.complete = True
        known = {record.id: record for record in self._books}
        self.instances.take_up(reconcile(running, self._desired.now, known))
        self._on_open()
        machines = set(self._machines())
        for node in machines - answered:  # it came meanwhile, or is slow
            self._welcome(node)
        held = {node for record in self._books if record.spec for node in record.spec.nodes}
        for node in held - machines:  # it went meanwhile
            self._judge(node)
        wait_s = max([0.0, *map(self._may_come_in_s, self._roster.everyone - answered)])
        if wait_s > 0:  # machines of before may be about to come, with what they run
            self._me.send_after(wait_s, self._me.pid, (Atom("settled"), epoch))
        else:
            self._begin_missing(epoch)

    def _may_come_in_s(self, node: str) -> float:
        """How long to wait for a machine that has not said what it runs."""
        if node in self._went_s and node not in self._up:  # seen to go: see ``group_orders.judge``
            return self._went_s[node] + group_orders.GRACE_S - self._now_s()
        return SETTLE_S

    def _begin_missing(self, epoch: int) -> None:
        """Bring up what should run and does not, the most important first."""
        if not self.complete or not self._epoch:
            return
        known = {record.id: record for record in self._books}
        missing = reconcile((), self._desired.now, known).missing
        for record in self._books:  # their machines have not come
            idle = record.worker is None and record.group is None and record.spec is not None
            if idle and record.state == "recovering" and record.coordinator is None:
                missing.append(record)
        for record in sorted(missing, key=lambda r: -r.wanted.options.priority):
            record.epoch = max(record.epoch, self._routes.newest(record.id))
            self.instances.begin_wanted(record)

    # -- moving and growing ----------------------------------------------------------------

    def _move(self, id_: str, why: str) -> None:
        """An instance that moved often has waited; it may be well again meanwhile."""
        record = self._books.get(id_) if self.complete else None
        if record is None or record.spec is None or record.state != "recovering":
            return
        whole = set(record.spec.nodes) <= set(self._machines())
        if not whole or (record.coordinator is None and record.worker is None):
            self.instances.move(record, why)

    def _reconsider_in(self, wait_s: float) -> None:
        """Once, however many machines come."""
        if not self._reconsiders:
            self._reconsiders = True
            self._me.send_after(wait_s, self._me.pid, (Atom("reconsider"),))

    def _reconsider(self) -> None:
        """Machines came: is there a better place for what runs?"""
        self._reconsiders = False
        if not self.complete:
            return
        moves = self.instances.moves
        wait_s = moves.settles_in_s(self._now_s())
        if wait_s > 0:
            self._reconsider_in(wait_s)
            return
        for record in self._books:
            if self._may_grow(record) and record.spec is not None:
                work = partial(
                    weigh,
                    spec=record.spec,
                    options=record.wanted.options,
                    defaults=self._defaults,
                    used=self._books.used(but=record.id),
                    books=self._me.pid,
                )
                self._spawn(work, f"a better place for {record.id}")

    def _may_grow(self, record: Record) -> bool:
        free = record.wanted.options.shape() is None and record.worker is None
        may = self.instances.moves.may_grow(record.id, self._now_s())
        return record.state == "ready" and free and may

    def _better(self, id_: str, text: str) -> None:
        record = self._books.get(id_) if self.complete else None
        if record is not None and self._may_grow(record):
            self.instances.move_drained(record, text)


def _leader_changed() -> Term:
    text = "this machine leads no more; look with `ctl status` whether it was done, else ask again"
    return (_ERROR, Atom("leader_changed"), text)
