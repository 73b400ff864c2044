"""The registered process ``scheduler``: which instances should run, which do, who serves what.

================================================  ==========================================
call ``{load, Model, Options}``                   ``{ok, InstanceId}`` | ``{error, Kind, Text}``
call ``{unload, InstanceId}``                     ``ok`` | ``{error, not_found, Text}``
call ``{find, Model}``                            ``{ok, InstanceId, Pid}`` once one is ready
call ``instances``                                list of ``{Pid | undefined, Map}``
call ``{path, Model}``                            ``{ok, Id, Path, ContextTokens}`` or an error
call ``{set_default, Model}``                     ``ok``: the alias ``default`` names it
call ``{replace_default, Old, New}``              ``ok``: likewise, if it named ``Old``
call ``wanted``                                   list of ``{InstanceId, Model}``
call ``forget_all``                               ``ok``: nothing is wanted any more
cast ``stopping``                                 the node ends: what stops now did not fail
================================================  ==========================================

What takes long (fetching, loading, draining) runs in processes of its own (``bring_up``);
this one only keeps the books, so it always answers. Until it knows what runs already, calls
wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import bring_up
from control.books import Absent, Books, ComingUp, Failed, Record, Served
from control.desired import Desired, Wanted, read_desired, write_desired
from control.errors import ControlError, NotReady
from control.events import publish
from control.instance_spec import InstanceSpec
from control.load_options import LoadOptions
from control.machine import Machine
from control.placement import Defaults, Host, host_of
from control.rank import RankLimits
from models.card import Card

log = logging.getLogger("control.scheduler")

DRAIN_S = 30.0
DEMAND_RETRY_S = 10.0  # after a load on demand failed, before the next request tries again
AT_ONCE = ("wanted", "instances")  # calls that need no complete books


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model reference, looked up.

    Attributes:
        path: of its files, where they are on this machine.
        card: what is known of it where they are not.
    """

    id: str
    ref: str
    path: Path | None
    card: Card | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the scheduler may know of models; neither function uses the network.

    Attributes:
        resolve: an operator's reference, paths included; raises UnknownModel.
        card_of: card id or alias -> card id; raises UnknownModel. Looks at no file, since the
            names it is given come from clients.
    """

    resolve: Callable[[str], Resolved]
    card_of: Callable[[str], str]


class Scheduler(GenServer):
    """Keeps the books of instances.

    Args:
        desired_path: file of the desired state.
        autoload: load a known model on demand.
        refuse: why this machine may not run a model at all (its roles), or empty.
    """

    def __init__(
        self,
        lookup: Lookup,
        *,
        desired_path: Path,
        defaults: Defaults,
        limits: RankLimits,
        machine: Callable[[], Machine],
        autoload: bool,
        refuse: str = "",
    ) -> None:
        super().__init__()
        self._lookup = lookup
        self._path = desired_path
        self._defaults, self._limits, self._autoload = defaults, limits, autoload
        self._machine, self._refuse = machine, refuse
        self.desired = Desired()
        self.books = Books()
        self._waiting: list[tuple[str, Term]] = []  # (model id, From) of `find`
        self._early: list[tuple[Term, Term]] = []  # (request, From) from before the books were full
        self._complete = False
        self._stopping = False
        self._demand_failed: dict[str, tuple[float, str]] = {}  # model -> (when, why)

    def format_state(self) -> Term:
        return {
            Atom("desired_version"): self.desired.version,
            Atom("default"): self.desired.default,
            Atom("instances"): [(r.id, Atom(r.state), r.epoch) for r in self.books],
            Atom("waiting"): len(self._waiting),
        }

    async def init(self, me: Process) -> None:
        me.trap_exit = True
        self.desired = read_desired(self._path)
        me.spawn(self._find_running, link=True, label="reconcile")

    async def handle_call(self, request: Term, from_: Term) -> Term:
        if not self._complete and request not in AT_ONCE:
            self._early.append((request, from_))
            return NOREPLY
        return self._answer(request, from_)

    def _answer(self, request: Term, from_: Term) -> Term:
        try:
            return self._handle(request, from_)
        except ControlError as exc:
            return (Atom("error"), Atom(exc.kind), str(exc))

    def _handle(self, request: Term, from_: Term) -> Term:
        match request:
            case ("load", model, dict(options)):
                return self._load(text_of(model), LoadOptions.from_term(options), from_)
            case ("unload", instance):
                return self._unload(text_of(instance), from_)
            case ("find", model):
                return self._find(text_of(model), from_)
            case ("path", model):
                return self._path_of(text_of(model))
            case ("set_default", model):
                self._save(self.desired.with_default(self._lookup.resolve(text_of(model)).id))
                return Atom("ok")
            case ("replace_default", old, new):
                if self.desired.default == text_of(old):
                    new_id = self._lookup.resolve(text_of(new)).id
                    self._save(self.desired.with_default(new_id))
                return Atom("ok")
            case "wanted":
                return [(w.id, w.model) for w in self.desired.wanted]
            case "forget_all":
                for record in self.books:
                    self._unload(record.id, None)
                self._save(Desired(self.desired.version + 1))
                return Atom("ok")
            case "instances":
                return [(r.coordinator or Atom("undefined"), r.describe()) for r in self.books]
            case _:
                return (Atom("error"), Atom("unknown_call"), f"scheduler: {show(request)}")

    async def handle_cast(self, message: Term) -> None:
        match message:
            case "stopping":
                self._stopping = True  # from now on groups end by no fault of theirs
            case _:
                await super().handle_cast(message)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("instance", id_, state, Pid() as pid, int(epoch), text):
                self._on_instance(text_of(id_), str(state), pid, epoch, text_of(text))
            case ("prepared", str(id_), InstanceSpec() as spec):
                self._on_prepared(id_, spec)
            case ("started", str(id_), Pid() as group):
                if record := self.books.get(id_):
                    record.group = self.me.monitor(group)
            case ("failed", str(id_), kind, text):
                self._on_failed(id_, str(kind), text_of(text))
            case ("group_down", str(id_), bool(alone), reason):
                self._on_group_judged(id_, alone, reason)
            case ("stopped", str(id_)):
                self._on_stopped(id_)
            case ("running", list(found)):
                self._reconcile(found)
            case ("DOWN", Ref() as monitor, _, _, reason):
                self._on_down(monitor, reason)
            case ("EXIT", pid, reason):
                self._on_worker_exit(pid, reason)
            case _:
                await super().handle_info(message)

    # -- load ------------------------------------------------------------------------------

    def _load(self, ref: str, options: LoadOptions, from_: Term) -> Term:
        if self._refuse:
            raise NotReady(ref, self._refuse, kind="no_compute")
        resolved = self._lookup.resolve(ref)
        record = self._begin(Record("", resolved.id, Wanted("", ref, options)), resolved)
        self._save(self.desired.add(record.wanted))
        if resolved.path is None:
            return (Atom("ok"), record.id)
        record.reply_to = from_  # the files are here: a broken one is told to the caller
        return NOREPLY

    def _begin(self, record: Record, resolved: Resolved) -> Record:
        """Bring ``record`` up; one without an id gets a new one."""
        options = record.wanted.options
        if not record.id:
            record.id = self.books.new_id(resolved.id, self.desired)
            record.wanted = Wanted(record.id, record.wanted.model, options)
        self.books.add(record)
        self._change(record, "pulling")
        plan = bring_up.Plan(
            id=record.id,
            model=resolved.id,
            ref=record.wanted.model,
            options=options,
            defaults=self._defaults,
            host=self._host(record.id),
        )
        record.worker = self.me.spawn(
            lambda me: bring_up.bring_up(
                me, plan, history=record.history, limits=self._limits, books=self.me.pid
            ),
            link=True,
            label=f"bring up {record.id}",
        )
        return record

    def _host(self, id_: str) -> Host:
        """This machine, less what instances other than ``id_`` take of it."""
        return host_of(str(self.me.node.name), self._machine(), self.books.memory_bytes(id_))

    def _begin_again(self, record: Record) -> None:
        """Bring up what should run but does not."""
        try:
            if self._refuse:
                raise NotReady(record.model, self._refuse, kind="no_compute")
            resolved = self._lookup.resolve(record.wanted.model)
        except ControlError as exc:
            self._fail(record, str(exc))
        else:
            record.model = resolved.id
            self._begin(record, resolved)

    def _on_prepared(self, id_: str, spec: InstanceSpec) -> None:
        if record := self.books.get(id_):
            record.spec = spec
            self._change(record, "loading")
            self._answer_load(record, (Atom("ok"), id_))

    def _on_failed(self, id_: str, kind: str, text: str) -> None:
        record = self.books.get(id_)
        if record is None:
            return
        if record.on_demand and not record.ever_ready:
            self._forget_demand(record, text)
        elif record.reply_to is not None and record.spec is None:
            self.books.remove(id_)  # told to the caller: nothing is left over
            self._save(self.desired.remove(id_))
            self._change(record, "unloaded", text)
            self._answer_load(record, (Atom("error"), Atom(kind), text))
        else:
            self._fail(record, text)
        self._serve_waiting()

    def _forget_demand(self, record: Record, text: str) -> None:
        """A load on demand failed: its askers are told, the next one after a while tries again."""
        now_s = asyncio.get_running_loop().time()
        self._demand_failed[record.model] = (now_s, text)
        self._take_down(record)
        self.books.remove(record.id)
        self._change(record, "unloaded", text)

    def _answer_load(self, record: Record, answer: Term) -> None:
        if record.reply_to is not None:
            gen_server.reply(self.me, record.reply_to, answer)
            record.reply_to = None

    # -- life of an instance ---------------------------------------------------------------

    def _change(self, record: Record, state: str, text: str = "") -> None:
        """A new state, and word of it to whoever listens."""
        record.state, record.text = state, text
        publish(
            self.me,
            "instance",
            {
                Atom("id"): record.id,
                Atom("model"): record.model,
                Atom("state"): Atom(state),
                Atom("epoch"): record.epoch,
                Atom("text"): text,
            },
        )

    def _on_instance(self, id_: str, state: str, pid: Pid, epoch: int, text: str) -> None:
        record = self.books.get(id_)
        if record is None or epoch < record.epoch or record.state in ("draining", "failed"):
            return
        if record.coordinator != pid:
            if record.watch is not None:
                self.me.demonitor(record.watch)
            record.coordinator, record.watch = pid, self.me.monitor(pid)
        record.epoch = epoch
        if state == "failed":
            self._on_failed(id_, "load_failed", text)
            return
        record.ever_ready = record.ever_ready or state == "ready"
        self._change(record, state, text)
        self._serve_waiting()

    def _on_down(self, monitor: Ref, reason: Term) -> None:
        """A coordinator ended (the next epoch comes), or a whole group."""
        if record := self.books.first(lambda r: r.watch == monitor):
            record.coordinator = record.watch = None
            if record.state == "ready":  # nobody is sent to a server that is gone
                self._change(record, "recovering")
        elif record := self.books.first(lambda r: r.group == monitor):
            record.group = None
            if record.state not in ("draining", "failed") and not self._stopping:
                self._change(record, "recovering")
                why = partial(self._find_out, record.id, reason)
                self.me.spawn(why, link=True, label=f"why {record.id} is down")

    async def _find_out(self, id_: str, reason: Term, me: Process) -> None:
        """Whether a group ended alone, its budget spent, or went down with ``instance_sup``."""
        alone = await bring_up.is_supervisor_up(me)
        me.send(self.me.pid, (Atom("group_down"), id_, alone, reason))

    def _on_group_judged(self, id_: str, alone: bool, reason: Term) -> None:
        record = self.books.get(id_)
        if record is None or record.state in ("draining", "failed") or self._stopping:
            return
        if alone:
            why = f"its supervisor ended with {show(reason)}"
            if record.history.exhausted():
                why = f"restart budget spent after {record.epoch} epochs"
            last = record.history.last_error
            text = f"{why}; last error: {last}" if last else why
            self._on_failed(id_, "restart_budget_spent", text)
        else:
            log.warning("instance %s went down with instance_sup; it starts again", id_)
            self._begin_again(record)
            self._serve_waiting()

    def _fail(self, record: Record, text: str) -> None:
        log.error("instance %s failed: %s", record.id, text)
        record.coordinator = None
        self.books.add(record)
        self._change(record, "failed", text)
        self._take_down(record)
        if not record.ever_ready and record.epoch <= 1:  # it never worked: not again by itself
            self._save(self.desired.remove(record.id))

    def _take_down(self, record: Record) -> None:
        """End what is left of an instance's processes."""
        if record.group is not None or record.spec is not None:
            self.me.spawn(
                lambda me: bring_up.take_down(me, record.id, None, 0.0, self.me.pid),
                link=True,
                label=f"end {record.id}",
            )

    def _on_worker_exit(self, pid: Term, reason: Term) -> None:
        record = self.books.first(lambda r: r.worker == pid)
        if record is not None:
            record.worker = None
            if reason not in ("normal", "killed") and record.state in ("pulling", "loading"):
                self._on_failed(record.id, "internal_error", f"bringing it up: {show(reason, 500)}")

    # -- unload ----------------------------------------------------------------------------

    def _unload(self, id_: str, from_: Term) -> Term:
        record = self.books.get(id_)
        if record is None:
            running = ", ".join(self.books.ids()) or "none"
            return (Atom("error"), Atom("not_found"), f"no instance {id_!r}; running: {running}")
        self._save(self.desired.remove(id_))
        if record.state == "draining":
            record.leavers.append(from_)
            return NOREPLY
        if record.reply_to is not None:
            self._answer_load(record, (Atom("error"), Atom("unloaded"), f"{id_} was unloaded"))
        if record.worker is not None:
            self.me.exit(record.worker, Atom("kill"))
        record.leavers.append(from_)
        self._change(record, "draining")
        coordinator = record.coordinator
        record.worker = self.me.spawn(
            lambda me: bring_up.take_down(me, id_, coordinator, DRAIN_S, self.me.pid),
            link=True,
            label=f"take down {id_}",
        )
        self._serve_waiting()
        return NOREPLY

    def _on_stopped(self, id_: str) -> None:
        record = self.books.get(id_)
        if record is not None and record.state == "draining":
            self.books.remove(id_)
            self._change(record, "unloaded")
            for from_ in record.leavers:
                if from_ is not None:
                    gen_server.reply(self.me, from_, Atom("ok"))
        self._serve_waiting()

    # -- who serves ------------------------------------------------------------------------

    def _find(self, name: str, from_: Term) -> Term:
        model = self._model_id(name)
        answer = self._route(model)
        if answer is None:
            self._waiting.append((model, from_))
            return NOREPLY
        return answer

    def _model_id(self, name: str) -> str:
        """Model id of ``default``, an instance, a loaded model or a card. Raises UnknownModel."""
        if name == "default" and self.desired.default:
            return self.desired.default
        return self.books.model_of(name) or self._lookup.card_of(name)

    def _route(self, model: str) -> Term | None:
        """An answer for ``find``, or None while it is worth waiting."""
        match self.books.route(model):
            case Served(instance, coordinator):
                return (Atom("ok"), instance, coordinator)
            case ComingUp():
                return None
            case Failed(text):
                return (Atom("error"), Atom("failed"), text)
            case Absent() if not self._autoload:
                return (Atom("error"), Atom("not_loaded"), f"no instance of {model} runs here")
            case Absent():
                return self._demand(model)

    def _demand(self, model: str) -> Term | None:
        """Load ``model`` for whoever asks, unless that has just failed."""
        failed_s, why = self._demand_failed.get(model, (0.0, ""))
        if why and asyncio.get_running_loop().time() - failed_s < DEMAND_RETRY_S:
            return (Atom("error"), Atom("failed"), why)
        self._demand_failed.pop(model, None)
        if self._refuse:
            return (Atom("error"), Atom("no_compute"), self._refuse)
        try:
            resolved = self._lookup.resolve(self._lookup.card_of(model))
        except ControlError as exc:
            return (Atom("error"), Atom(exc.kind), str(exc))
        self._begin(Record("", resolved.id, Wanted("", model), on_demand=True), resolved)
        return None

    def _serve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for model, from_ in waiting:
            answer = self._route(model)
            if answer is None:
                self._waiting.append((model, from_))
            else:
                gen_server.reply(self.me, from_, answer)

    def _path_of(self, name: str) -> Term:
        model = self._model_id(name)
        record = self.books.first(lambda r: r.model == model and r.spec is not None)
        if record is None or record.spec is None:
            return (Atom("error"), Atom("not_loaded"), f"no instance of {model} runs here")
        return (Atom("ok"), model, str(record.spec.path), record.spec.context_tokens)

    # -- after a restart -------------------------------------------------------------------

    async def _find_running(self, me: Process) -> None:
        me.send(self.me.pid, (Atom("running"), await bring_up.running_instances(me)))

    def _reconcile(self, running: list[Any]) -> None:
        """Take over what runs, start what should run but does not, then answer who waited."""
        wanted_of = {wanted.id: wanted for wanted in self.desired.wanted}
        for spec, group, history in running:
            wanted = wanted_of.get(spec.id)
            record = Record(
                spec.id,
                spec.model,
                wanted or Wanted(spec.id, spec.model),
                on_demand=wanted is None,
                state="recovering",
                ever_ready=True,
                spec=spec,
            )
            record.history, record.group = history, self.me.monitor(group)
            self.books.add(record)
            self.me.send(Atom(spec.id), Atom("announce"))
        for wanted in self.desired.wanted:
            if wanted.id not in self.books:
                self._begin_again(Record(wanted.id, wanted.model, wanted, ever_ready=True))
        self._complete = True
        early, self._early = self._early, []
        for request, from_ in early:
            answer = self._answer(request, from_)
            if answer is not NOREPLY:
                gen_server.reply(self.me, from_, answer)

    def _save(self, desired: Desired) -> None:
        self.desired = desired
        try:
            write_desired(self._path, desired)
        except OSError as exc:
            log.error("cannot write %s: %s; the change is lost at a restart", self._path, exc)
