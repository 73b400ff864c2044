"""Life of the cluster's instances, as the leader keeps it: brought up, moved, failing, gone.

The scheduler's hands: what it hears of its helpers, of coordinators and of machines ends in a
method here. Only the leader has one; another leader begins with what runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Final

from bridge import gen_server
from bridge.gen_server import NOREPLY
from bridge.process import Body, Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import bring_up, group_orders
from control.books import RUNNING, Books, Record
from control.desired import Wanted
from control.desired_state import DesiredState
from control.errors import ControlError
from control.events import publish
from control.instance_spec import InstanceSpec
from control.lookup import Lookup
from control.moves import Moves
from control.placement_request import Defaults
from control.reconcile import Running, Verdict
from control.turns import Turns

log = logging.getLogger("control.scheduler")

DRAIN_S: Final = 30.0
RETRY_S: Final = 10.0
STOPPING_S: Final = 1.0
# What a rank says whose machine has lost the files; others may have them.
FILES_GONE: Final = frozenset({"no_such_model", "parts_missing"})
# Reasons of a failure that more machines, or more memory, may mend.
MENDABLE: Final = frozenset({"no_placement", "start_failed", "model_store_lost", "no_authority"})


class Instances:
    """Records and the processes behind them.

    Args:
        me: the scheduler's process: helpers are linked to it and report to it.
        up: the machines that are, this one among them.
        now_s: a clock.
        on_change: called when an answer for those who wait may have changed.
        on_demand_failed: told model and reason when a load that a request began came to nothing.
    """

    def __init__(
        self,
        me: Process,
        books: Books,
        desired: DesiredState,
        lookup: Lookup,
        defaults: Defaults,
        *,
        up: Callable[[], Collection[str]],
        now_s: Callable[[], float],
        on_change: Callable[[], None],
        on_demand_failed: Callable[[str, str], None],
    ) -> None:
        self._me, self._books, self._desired = me, books, desired
        self._lookup, self._defaults = lookup, defaults
        self._up, self._now_s = up, now_s
        self._on_change, self._on_demand_failed = on_change, on_demand_failed
        self.moves = Moves()
        self.turns = Turns(me)
        self._leaving_well: set[str] = set()  # that are placed anew when they have drained
        self.stopping = False  # from then on groups end by no fault of theirs
        self._helpers: set[Term] = set()

    # -- coming up -------------------------------------------------------------------------

    def begin(self, record: Record, *, end_at: str = "") -> None:
        """Bring ``record`` up, after the end of its group on the node ``end_at``, if named."""
        self._books.add(record)
        record.spec, record.coordinator, record.retry = None, None, False
        record.taken = {}
        self._end_worker(record)
        self._unwatch(record)
        self._change(record, "recovering" if record.ever_ready else "pulling")
        plan = bring_up.Plan(
            id=record.id,
            model=record.model,
            options=record.wanted.options,
            defaults=self._defaults,
            wanted=not record.on_demand,
            first_epoch=record.epoch,
        )

        async def work(me: Process) -> None:
            if end_at:
                await group_orders.stop_group(me, end_at, record.id, 0.0)
            await bring_up.bring_up(me, plan, self._me.pid)

        record.worker = self._me.spawn(work, link=True, label=f"bring up {record.id}")

    def begin_wanted(self, record: Record) -> None:
        """Bring up what should run but does not."""
        try:
            record.model = self.resolve(record.wanted.model)
        except ControlError as exc:
            self._books.add(record)
            self._fail(record, exc.kind, str(exc))
        else:
            self.begin(record)

    def resolve(self, ref: str) -> str:
        """Id of a model; a path may be that of another machine. Raises UnknownModel."""
        try:
            return self._lookup.resolve(ref).id
        except ControlError:
            if ref.startswith("/") and len(self._up()) > 1:
                return ref
            raise

    def on_fetching(self, id_: str) -> None:
        """Files come from outside: whoever asked need not wait for that."""
        if record := self._books.get(id_):
            self._change(record, "pulling")
            self._answer_load(record, (Atom("ok"), id_))

    def works(self, worker: Pid, id_: str) -> bool:
        """Whether ``worker`` is who works on ``id_`` now; another was ended a moment ago."""
        record = self._books.get(id_)
        return record is not None and record.worker == worker

    def place_turn(self, id_: str, from_: Term) -> Term:
        """Ask for what is taken, as the only one that places."""
        if not self.works(from_[0], id_):  # it would hold the turn for ever
            return (Atom("error"), Atom("not_its_worker"), f"another process brings up {id_}")
        return self.turns.ask(id_, from_, self._turn)

    def _turn(self, id_: str) -> Term:
        record = self._books.get(id_)
        avoid = sorted(self._books.nodes_of(record.model, but=id_)) if record else []
        return (Atom("ok"), self._books.used(but=id_), self._books.tenants(but=id_), avoid)

    def on_placed(self, id_: str, taken: dict[tuple[str, str], int]) -> None:
        """Its place is chosen: others find that much less."""
        if record := self._books.get(id_):
            record.taken = taken
        self.turns.end(id_)

    def on_prepared(self, id_: str, spec: InstanceSpec) -> None:
        """Every machine has its files: its group starts."""
        record = self._books.get(id_)
        if record is not None and record.state != "draining":  # else unloaded a moment ago
            record.spec = spec
            self._change(record, "recovering" if record.ever_ready else "loading")
            self._answer_load(record, (Atom("ok"), id_))

    def on_started(self, id_: str, group: Pid) -> None:
        """The supervisor of its group is there."""
        if (record := self._books.get(id_)) and record.state != "draining":
            self._unwatch(record)
            record.group = self._me.monitor(group)

    def on_make_room(self, id_: str, others: Iterable[str]) -> None:
        """It would fit without these: they go first."""
        self.turns.end(id_)
        record = self._books.get(id_)
        if record is None or record.state == "draining":
            return
        leaving = [one for name in others if (one := self._books.get(name)) is not None]
        if not leaving:  # they are gone already
            self.begin(record)
            return
        for one in leaving:
            log.info("%s makes room for %s", one.id, id_)
            if one.state != "draining":
                self._put_off(one, f"it made room for {id_}")
        self._change(record, record.state, "waits until there is room")
        record.worker = None
        self.waiting_for_room[id_] = {one.id for one in leaving}

    @property
    def waiting_for_room(self) -> dict[str, set[str]]:
        """Who waits for the end of whom."""
        return self.turns.waiting_for_room

    def _put_off(self, record: Record, why: str) -> None:
        """Drain an instance and end it; what is wanted comes back when there is room."""
        if record.on_demand and record.id not in self._leaving_well:
            self.unload(record.id, None)
            return
        node = record.spec.head_node if record.spec else ""
        self._end_worker(record)
        self._unwatch(record)
        record.retry = True
        self._change(record, "draining", why)
        record.worker = self._me.spawn(
            lambda me: group_orders.take_down(me, record.id, node, DRAIN_S, self._me.pid),
            link=True,
            label=f"put off {record.id}",
        )

    # -- failing ---------------------------------------------------------------------------

    def on_failed(self, id_: str, kind: str, text: str) -> None:
        """It came to nothing, or ended for good."""
        self.turns.end(id_)
        record = self._books.get(id_)
        if record is None or record.state == "draining":
            return
        if kind == "machine_lost" and record.spec is not None:
            if record.spec.head_node in self._up():  # it stops, and is about to say so
                self._change(record, "recovering", text)
                self._me.send_after(STOPPING_S, self._me.pid, (Atom("move"), id_, text))
            else:
                self.move(record, text)
        elif record.on_demand and not record.ever_ready:
            self._forget_demand(record, text)
        elif record.reply_to is not None and record.spec is None:
            self._books.remove(id_)  # told to the caller: nothing is left over
            self._desired.save(self._desired.now.remove(id_))
            self._change(record, "unloaded", text)
            self._answer_load(record, (Atom("error"), Atom(kind), text))
        else:
            self._fail(record, kind, text)
        self._on_change()

    def _forget_demand(self, record: Record, text: str) -> None:
        """A load on demand failed: its askers are told, the next one after a while tries again."""
        self._on_demand_failed(record.model, text)
        self._end_group(record)
        self._books.remove(record.id)
        self._change(record, "unloaded", text)

    def _fail(self, record: Record, kind: str, text: str) -> None:
        log.error("instance %s failed: %s", record.id, text)
        record.coordinator = None
        record.retry = kind in MENDABLE and record.ever_ready
        self._change(record, "failed", text)
        if record.retry:
            self._retry_later(record)
        self._end_group(record)
        if not record.ever_ready and record.epoch <= 1:  # it never worked: not again by itself
            self._desired.save(self._desired.now.remove(record.id))

    def _retry_later(self, record: Record) -> None:
        wait_s = max(RETRY_S, self.moves.wait_s(record.id, self._now_s()))
        self._me.send_after(wait_s, self._me.pid, (Atom("retry"), record.id))

    def _end_group(self, record: Record) -> None:
        """End what is left of an instance's processes."""
        self._unwatch(record)
        if record.spec is not None:
            node = record.spec.head_node
            self._help(
                lambda me: group_orders.stop_group(me, node, record.id, 0.0), f"end {record.id}"
            )

    def _help(self, body: Body, label: str) -> None:
        """A process that ends with this node's leading."""
        self._helpers.add(self._me.spawn(body, link=True, label=label))

    def _answer_load(self, record: Record, answer: Term) -> None:
        if record.reply_to is not None:
            gen_server.reply(self._me, record.reply_to, answer)
            record.reply_to = None

    def _change(self, record: Record, state: str, text: str = "") -> None:
        """A new state, and word of it to whoever listens."""
        record.state, record.text = state, text
        known: dict[Any, Term] = {
            Atom("id"): record.id,
            Atom("model"): record.model,
            Atom("state"): Atom(state),
            Atom("epoch"): record.epoch,
            Atom("text"): text,
        }
        if record.spec is not None:
            known[Atom("nodes")] = [Atom(node) for node in record.spec.nodes]
        publish(self._me, "instance", known)

    # -- what coordinators and groups say --------------------------------------------------

    def on_instance(self, id_: str, state: str, pid: Pid, epoch: int, text: str) -> None:
        """Word of a coordinator."""
        record = self._books.get(id_)
        if record is None or epoch < record.epoch or record.state in ("draining", "failed"):
            return
        if record.spec is None or record.spec.head_node != pid.node:
            return  # of a place that it has left
        record.coordinator, record.epoch = pid, epoch
        if state == "failed":
            if record.ever_ready and text.partition(":")[0] in FILES_GONE:
                self.move(record, text)
            else:
                self.on_failed(id_, "load_failed", text)
            return
        record.ever_ready = record.ever_ready or state == "ready"
        self._change(record, state, text)
        self._on_change()

    def on_coordinator_down(self, pid: Pid) -> None:
        """The next epoch comes, unless its group or its machine is gone too."""
        record = self._books.first(lambda r: r.coordinator == pid)
        if record is not None:
            record.coordinator = None
            if record.state == "ready":  # nobody is sent to a server that is gone
                self._change(record, "recovering")

    def on_group_down(self, monitor: Ref, reason: Term) -> None:
        """A whole group ended, or its machine is not to be reached."""
        record = self._books.first(lambda r: r.group == monitor)
        if record is None:
            return
        record.group = None
        if record.state in ("draining", "failed") or self.stopping or record.spec is None:
            return
        self._change(record, "recovering")
        if reason != "noconnection":  # else membership says what becomes of its machine
            node = record.spec.head_node
            self._help(
                lambda me: group_orders.find_out(me, record.id, node, reason, self._me.pid),
                f"why {record.id} is down",
            )

    def on_group_judged(self, id_: str, known: Term, reason: Term) -> None:
        """Its group ended: a budget spent, a machine lost, or ``instance_sup`` with all it has."""
        record = self._books.get(id_)
        if record is None or record.spec is None or self.stopping:
            return
        if record.state in ("draining", "failed") or record.group is not None:
            return
        missing = [node for node in record.spec.nodes if node not in self._up()]
        match known:
            case {"alone": False}:
                log.warning("instance %s went down with instance_sup; it starts again", id_)
                self.start_again(record)
            case {"ordered": True}:
                self.move(record, "an earlier leader ended it")
            case {"exhausted": bool(exhausted), "epoch": int(epoch), "last_error": last_error}:
                record.epoch = max(record.epoch, epoch)
                if missing:
                    self.move(record, f"{', '.join(missing)} is gone")
                    return
                why = f"its supervisor ended with {show(reason)}"
                if exhausted:
                    why = f"restart budget spent after {record.epoch} epochs"
                last = text_of(last_error)
                text = f"{why}; last error: {last}" if last else why
                self.on_failed(id_, "restart_budget_spent", text)
            case _:  # its machine does not answer: membership says what becomes of it
                pass
        self._on_change()

    def start_when_whole(self, record: Record) -> bool:
        """Start it where it was, if all its machines are here; else they may be about to come."""
        assert record.spec is not None
        if record.worker is not None or record.group is not None:
            return False
        if any(node not in self._up() for node in record.spec.nodes):
            return False
        self.start_again(record)
        return True

    def start_again(self, record: Record) -> None:
        """The same ranks at the same place, where their weights may still be."""
        spec = record.spec
        assert spec is not None
        spec = record.spec = replace(spec, first_epoch=max(spec.first_epoch, record.epoch))
        self._change(record, "recovering")
        self._end_worker(record)
        record.worker = self._me.spawn(
            lambda me: bring_up.start(me, spec, self._me.pid),
            link=True,
            label=f"start {record.id} again",
        )

    # -- machines --------------------------------------------------------------------------

    def take_up(self, verdict: Verdict) -> None:
        """Keep what runs, end what should not."""
        for record, group in verdict.kept:
            self._unwatch(record)
            self._books.add(record)
            if record.worker is None:  # else it will say so itself
                record.group = self._me.monitor(group)
            self._me.send((Atom(record.id), Atom(str(group.node))), Atom("announce"))
        for record in verdict.idle:
            self._books.add(record)
            self.start_when_whole(record)
        for one in verdict.surplus:
            log.warning("%s on %s is surplus; it ends", one.spec.id, one.node)
            self._help(partial(self._end_surplus, one), f"end {one.spec.id}")

    async def _end_surplus(self, one: Running, me: Process) -> None:
        await group_orders.stop_group(me, one.node, one.spec.id, DRAIN_S, only=one.group)
        record = self._books.get(one.spec.id)
        if record is not None and record.coordinator is not None:
            me.send(record.coordinator, Atom("announce"))  # some have heard of the other only

    def on_joined(self, node: str, running: Collection[Running]) -> None:
        """A machine is back whose groups are not: they start there again, weights and all."""
        ids = {one.spec.id for one in running if one.group is not None}
        for record in self._books:
            here = record.spec is not None and node in record.spec.nodes
            if here and record.id not in ids and record.state == "recovering":
                self.start_when_whole(record)

    def on_lost(self, node: str) -> None:
        """A machine is gone: its instances are placed on what is left."""
        for record in self._books:
            if record.spec is not None and node in record.spec.nodes:
                if record.state in RUNNING:
                    self.move(record, f"{node} is gone")
                elif record.state == "draining" and record.spec.head_node == node:
                    self._end_worker(record)
                    self._me.send(self._me.pid, (Atom("stopped"), record.id))

    def move(self, record: Record, why: str) -> None:
        """Place an instance anew; one that has moved often waits a while."""
        now_s = self._now_s()
        wait_s = self.moves.wait_s(record.id, now_s)
        if wait_s > 0:
            self._change(record, "recovering", f"{why}; it is placed again in {wait_s:.0f} s")
            self._me.send_after(wait_s, self._me.pid, (Atom("move"), record.id, why))
            return
        self.moves.note_move(record.id, now_s)
        log.warning("instance %s is placed anew: %s", record.id, why)
        assert record.spec is not None
        old = record.spec.head_node
        record.epoch += 1
        self.begin(record, end_at=old if old in self._up() else "")
        record.text = why

    def move_drained(self, record: Record, why: str) -> None:
        """Place one that runs well anew: its requests end first, and its memory is its own."""
        self.moves.note_move(record.id, self._now_s())
        log.warning("instance %s is placed anew: %s", record.id, why)
        record.epoch += 1
        self._leaving_well.add(record.id)
        self._put_off(record, why)

    def retry_failed(self, only: str = "") -> None:
        """There are more machines, or there is more room: what waits for that tries again."""
        now_s = self._now_s()
        for record in self._books:
            if only in ("", record.id) and record.state == "failed" and record.retry:
                if self.moves.wait_s(record.id, now_s) == 0:
                    self.moves.note_move(record.id, now_s)
                    self.begin_wanted(record)
                elif only:  # the others have a timer that runs
                    self._retry_later(record)

    # -- going -----------------------------------------------------------------------------

    def unload(self, id_: str, from_: Term) -> Term:
        """Drain, then end; ``from_`` (or nobody: None) is answered when it is gone."""
        record = self._books.get(id_)
        if record is None and not self._desired.now.has(id_):
            running = ", ".join(self._books.ids()) or "none"
            return (Atom("error"), Atom("not_found"), f"no instance {id_!r}; running: {running}")
        if record is None:  # it was about to be brought up
            record = Record(id_, "", Wanted(id_, ""), state="unloaded")
        record.leavers.append(from_)
        record.unsaved += 1
        self._desired.save(self._desired.now.remove(id_), partial(self._on_unload_saved, record))
        self.moves.forget(id_)
        self._leaving_well.discard(id_)
        record.retry = False
        if record.state in ("draining", "unloaded"):
            return NOREPLY
        if record.reply_to is not None:
            self._answer_load(record, (Atom("error"), Atom("unloaded"), f"{id_} was unloaded"))
        self._end_worker(record)
        self._unwatch(record)
        self._change(record, "draining")
        node = record.spec.head_node if record.spec else ""
        reachable = node if node in self._up() else ""
        record.worker = self._me.spawn(
            lambda me: group_orders.take_down(me, id_, reachable, DRAIN_S, self._me.pid),
            link=True,
            label=f"take down {id_}",
        )
        self._on_change()
        return NOREPLY

    def _on_unload_saved(self, record: Record, committed: bool) -> None:
        record.unsaved -= 1
        if committed:
            self._answer_leavers(record)
        else:
            text = "this machine leads no more; look with `ctl status` whether it is unloaded"
            self._answer_leavers(record, (Atom("error"), Atom("leader_changed"), text))

    def _answer_leavers(self, record: Record, why_not: Term = None) -> None:
        """It is unloaded when nothing of it is left, and when no other leader brings it back."""
        if why_not is None and (record.state == "draining" or record.unsaved):
            return
        for from_ in record.leavers:
            if from_ is not None:
                gen_server.reply(self._me, from_, why_not or Atom("ok"))
        record.leavers.clear()

    def on_stopped(self, id_: str) -> None:
        """Nothing of it is left."""
        record = self._books.get(id_)
        if record is not None and record.state == "draining":
            if record.id in self._leaving_well:
                self._leaving_well.discard(record.id)
                self.begin(record)
            elif record.retry:
                record.spec, record.coordinator, record.taken = None, None, {}
                self._change(record, "failed", record.text)
                self._retry_later(record)
            else:
                self._books.remove(id_)
                self._change(record, "unloaded")
            self._answer_leavers(record)
            newcomers = self.turns.left(id_)
            for name in newcomers:
                if (waiting := self._books.get(name)) and waiting.worker is None:
                    self.begin(waiting)
            if not newcomers:  # else the room is theirs
                self.retry_failed()
        self._on_change()

    def on_worker_exit(self, pid: Term, reason: Term) -> None:
        """A helper ended; one that crashed has told nobody why."""
        self._helpers.discard(pid)
        record = self._books.first(lambda r: r.worker == pid)
        if record is not None:
            record.worker = None
            self.turns.end(record.id)
            if reason not in ("normal", "killed") and record.state in (*RUNNING, "pulling"):
                self.on_failed(record.id, "internal_error", f"bringing it up: {show(reason, 500)}")
            elif reason not in ("normal", "killed") and record.state == "draining":
                self.on_stopped(record.id)

    def drop_all(self, why: str) -> None:
        """Another leads: the books are its own now."""
        for helper in self._helpers:
            self._me.exit(helper, Atom("kill"))
        for record in self._books:
            self._answer_load(record, (Atom("error"), Atom("leader_changed"), why))
            self._answer_leavers(record, (Atom("error"), Atom("leader_changed"), why))
            self._end_worker(record)
            self._unwatch(record)
            self._books.remove(record.id)
        self.turns.clear()
        self.moves = Moves()

    def _end_worker(self, record: Record) -> None:
        if record.worker is not None:
            worker, record.worker = record.worker, None
            self.turns.end(record.id)
            self._me.exit(worker, Atom("kill"))

    def _unwatch(self, record: Record) -> None:
        if record.group is not None:
            self._me.demonitor(record.group)
            record.group = None
