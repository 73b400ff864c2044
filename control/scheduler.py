"""The registered process ``scheduler``: which instances should run, which do, who serves what.

================================================  ==========================================
call ``{load, Model, Options}``                   ``{ok, InstanceId}`` | ``{error, Kind, Text}``
call ``{unload, InstanceId}``                     ``ok`` | ``{error, not_found, Text}``
call ``{find, Model}``                            ``{ok, InstanceId, Pid}`` once one is ready
call ``instances``                                list of ``{Pid | undefined, Map}``
call ``{path, Model}``                            ``{ok, Id, Path, ContextTokens}`` or an error
call ``{set_default, Model}``                     ``ok``: the alias ``default`` names it
call ``wanted``                                   list of ``{InstanceId, Model}``
call ``forget_all``                               ``ok``: nothing is wanted any more
call ``{replace_default, Old, New}``              ``ok``: likewise, if it named ``Old``
cast ``stopping``                                 the node ends: what stops now did not fail
================================================  ==========================================

What takes long (fetching, loading, draining) runs in processes of its own; this one only
keeps the books, so it always answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import bring_up
from control.desired import BadOption, Desired, LoadOptions, Wanted, read_desired, write_desired
from control.errors import ControlError, NotReady, UnknownModel
from control.events import publish
from control.instance import History, InstanceSpec, describe_spec
from control.rank import RankLimits

log = logging.getLogger("control.scheduler")

DRAIN_S = 30.0
SERVED = ("pulling", "loading", "recovering", "ready")  # states a request may wait for


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Defaults for what the options leave open."""

    context_tokens: int = 0
    num_slots: int = 4
    threads: int = 0
    device: str = ""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model reference, looked up: its id and whether its files are on this machine."""

    id: str
    ref: str
    local: bool


@dataclass(slots=True)
class Record:
    """The book entry of one instance."""

    id: str
    model: str
    wanted: Wanted
    state: str = "pulling"
    text: str = ""
    epoch: int = 0
    spec: InstanceSpec | None = None
    coordinator: Pid | None = None
    worker: Pid | None = None  # process that brings it up or takes it down
    group: Ref | None = None  # monitor of its supervisor
    reply_to: Term = None
    history: History = field(default_factory=History)


class Scheduler(GenServer):
    """Keeps the books of instances.

    Args:
        resolve: model reference -> Resolved; raises UnknownModel. No network.
        card_of: card id or alias -> card id; raises UnknownModel. Looks at no file, since
            the names that it is given come from clients.
        desired_path: file of the desired state.
        autoload: load a known model on demand.
    """

    def __init__(
        self,
        resolve: Callable[[str], Resolved],
        card_of: Callable[[str], str],
        *,
        desired_path: Path,
        shape: Shape,
        limits: RankLimits,
        autoload: bool,
    ) -> None:
        super().__init__()
        self._resolve, self._card_of = resolve, card_of
        self._path = desired_path
        self._shape, self._limits, self._autoload = shape, limits, autoload
        self.desired = Desired()
        self.records: dict[str, Record] = {}
        self._waiting: list[tuple[str, Term]] = []  # (model id, From)
        self._stopping = False

    def format_state(self) -> Term:
        return {
            Atom("desired_version"): self.desired.version,
            Atom("default"): self.desired.default,
            Atom("instances"): [(r.id, Atom(r.state), r.epoch) for r in self.records.values()],
            Atom("waiting"): len(self._waiting),
        }

    async def init(self, me: Process) -> None:
        self.me.trap_exit = True
        self.desired = read_desired(self._path)
        self.me.spawn(self._when_tree_is_up, link=True, label="reconcile")

    async def handle_call(self, request: Term, from_: Term) -> Term:
        try:
            return self._handle_call(request, from_)
        except (UnknownModel, BadOption, NotReady) as exc:
            return (Atom("error"), Atom(exc.kind), str(exc))

    def _handle_call(self, request: Term, from_: Term) -> Term:
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
                self._save(self.desired.with_default(self._resolve(text_of(model)).id))
                return Atom("ok")
            case ("replace_default", old, new):
                if self.desired.default == text_of(old):
                    self._save(self.desired.with_default(self._resolve(text_of(new)).id))
                return Atom("ok")
            case "wanted":
                return [(w.id, w.model) for w in self.desired.wanted]
            case "forget_all":
                for record in list(self.records.values()):
                    self._unload(record.id, None)
                self._save(Desired(self.desired.version + 1))
                return Atom("ok")
            case "instances":
                return [
                    (r.coordinator or Atom("undefined"), self._describe(r))
                    for r in self.records.values()
                ]
            case _:
                return (Atom("error"), Atom("unknown_call"), f"scheduler: {request!r:.200}")

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
                if id_ in self.records:
                    self.records[id_].group = self.me.monitor(group)
            case ("failed", str(id_), kind, text):
                self._on_failed(id_, str(kind), text_of(text))
            case ("group_down", str(id_), bool(alone), reason):
                self._on_group_judged(id_, alone, reason)
            case ("stopped", str(id_)):
                self._on_stopped(id_)
            case ("running", list(found)):
                self._reconcile(found)
            case ("DOWN", Ref() as monitor, _, _, reason):
                self._on_group_down(monitor, reason)
            case ("EXIT", pid, reason):
                self._on_worker_exit(pid, reason)
            case _:
                await super().handle_info(message)

    # -- load ------------------------------------------------------------------------------

    def _load(self, ref: str, options: LoadOptions, from_: Term) -> Term:
        resolved = self._resolve(ref)
        record = self._begin(self._new_id(resolved.id), resolved, ref, options)
        self._save(self.desired.add(record.wanted))
        if not resolved.local:
            return (Atom("ok"), record.id)
        record.reply_to = from_  # the files are here: a broken one is told to the caller
        return NOREPLY

    def _begin(self, id_: str, resolved: Resolved, ref: str, options: LoadOptions) -> Record:
        record = Record(id_, resolved.id, Wanted(id_, ref, options))
        self.records[id_] = record
        self._change(record, "pulling")
        plan = bring_up.Plan(
            id=id_,
            model=resolved.id,
            ref=ref,
            context_tokens=options.context or self._shape.context_tokens,
            num_slots=options.slots or self._shape.num_slots,
            threads=options.threads or self._shape.threads,
            device=options.device or self._shape.device,
        )
        record.worker = self.me.spawn(
            lambda me: bring_up.bring_up(
                me, plan, history=record.history, limits=self._limits, books=self.me.pid
            ),
            link=True,
            label=f"bring up {id_}",
        )
        return record

    def _new_id(self, model: str) -> str:
        last = model.rstrip("/").rpartition("/")[2]  # of a path or a hub reference
        slug = "".join(c if c.isalnum() or c in "-._" else "-" for c in last.lower()).strip("-")
        number = 1
        while f"{slug}-{number}" in self.records:
            number += 1
        return f"{slug}-{number}"

    def _on_prepared(self, id_: str, spec: InstanceSpec) -> None:
        record = self.records.get(id_)
        if record is None:
            return
        record.spec = spec
        self._change(record, "loading")
        self._answer_load(record, (Atom("ok"), id_))

    def _on_failed(self, id_: str, kind: str, text: str) -> None:
        record = self.records.get(id_)
        if record is None:
            return
        if record.reply_to is not None and record.spec is None:
            del self.records[id_]  # told to the caller: nothing is left over
            self._save(self.desired.remove(id_))
            self._answer_load(record, (Atom("error"), Atom(kind), text))
        else:
            self._fail(record, text)
        self._serve_waiting()

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
                Atom("reason"): text,
            },
        )

    def _answer_load(self, record: Record, answer: Term) -> None:
        if record.reply_to is not None:
            gen_server.reply(self.me, record.reply_to, answer)
            record.reply_to = None

    # -- life of an instance ---------------------------------------------------------------

    def _on_instance(self, id_: str, state: str, pid: Pid, epoch: int, text: str) -> None:
        record = self.records.get(id_)
        if record is None or epoch < record.epoch or record.state in ("draining", "failed"):
            return
        record.coordinator, record.epoch = pid, epoch
        if state == "failed":
            self._fail(record, text)
        else:
            self._change(record, state, text)
        self._serve_waiting()

    def _on_group_down(self, monitor: Ref, reason: Term) -> None:
        for record in list(self.records.values()):
            if record.group == monitor:
                record.group = record.coordinator = None
                if record.state not in ("draining", "failed") and not self._stopping:
                    record.state = "recovering"
                    self.me.spawn(
                        partial(self._find_out, record.id, reason), link=True, label="why down"
                    )

    async def _find_out(self, id_: str, reason: Term, me: Process) -> None:
        """Whether a group ended alone, its budget spent, or went down with ``instance_sup``."""
        alone = await bring_up.is_supervisor_up(me)
        me.send(self.me.pid, (Atom("group_down"), id_, alone, reason))

    def _on_group_judged(self, id_: str, alone: bool, reason: Term) -> None:
        record = self.records.get(id_)
        if record is None or record.state in ("draining", "failed") or self._stopping:
            return
        if alone:
            last = record.history.last_error or f"its supervisor ended with {reason!r}"
            text = f"restart budget spent after {record.epoch} epochs; last error: {last}"
            self._fail(record, text)
        else:
            log.warning("instance %s went down with instance_sup; it starts again", id_)
            self._begin_again(record)
        self._serve_waiting()

    def _begin_again(self, record: Record) -> None:
        wanted = record.wanted
        try:
            resolved = self._resolve(wanted.model)
        except ControlError as exc:
            self._fail(record, str(exc))
        else:
            self._begin(record.id, resolved, wanted.model, wanted.options)

    def _fail(self, record: Record, text: str) -> None:
        log.error("instance %s failed: %s", record.id, text)
        record.coordinator = None
        self._change(record, "failed", text)
        if record.group is not None or record.spec is not None:
            self.me.spawn(
                lambda me: bring_up.take_down(me, record.id, None, 0.0, self.me.pid),
                link=True,
                label=f"end {record.id}",
            )

    def _on_worker_exit(self, pid: Term, reason: Term) -> None:
        for record in list(self.records.values()):
            if record.worker == pid:
                record.worker = None
                if reason not in ("normal", "killed") and record.state in ("pulling", "loading"):
                    self._on_failed(record.id, "internal_error", f"bringing it up: {reason!r}")

    # -- unload ----------------------------------------------------------------------------

    def _unload(self, id_: str, from_: Term) -> Term:
        record = self.records.get(id_)
        if record is None:
            running = ", ".join(self.records) or "none"
            return (Atom("error"), Atom("not_found"), f"no instance {id_!r}; running: {running}")
        self._save(self.desired.remove(id_))
        if record.reply_to is not None:
            self._answer_load(record, (Atom("error"), Atom("unloaded"), f"{id_} was unloaded"))
        if record.worker is not None:
            self.me.exit(record.worker, Atom("kill"))
        record.reply_to = from_
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
        record = self.records.get(id_)
        if record is not None and record.state == "draining":
            del self.records[id_]
            self._change(record, "unloaded")
            self._answer_load(record, Atom("ok"))
        self._serve_waiting()

    # -- who serves ------------------------------------------------------------------------

    def _find(self, name: str, from_: Term) -> Term:
        model = self._model_id(name)
        answer = self._route(model)
        if answer is not None:
            return answer
        self._waiting.append((model, from_))
        return NOREPLY

    def _model_id(self, name: str) -> str:
        """Model id of ``default``, an instance, a loaded model or a card. Raises UnknownModel."""
        if name == "default" and self.desired.default:
            return self.desired.default
        if name in self.records:
            return self.records[name].model
        for record in self.records.values():
            if name in (record.model, record.wanted.model):
                return record.model
        return self._card_of(name)

    def _route(self, model: str) -> Term | None:
        """An answer for ``find``, or None while it is worth waiting."""
        mine = [r for r in self.records.values() if r.model == model]
        for record in mine:
            if record.state == "ready" and record.coordinator is not None:
                return (Atom("ok"), record.id, record.coordinator)
        if any(r.state in SERVED for r in mine):
            return None
        failed = [r for r in mine if r.state == "failed"]
        if failed:
            return (Atom("error"), Atom("failed"), f"instance {failed[0].id}: {failed[0].text}")
        if self._autoload:
            resolved = self._resolve(model)
            record = self._begin(self._new_id(resolved.id), resolved, model, LoadOptions())
            self._save(self.desired.add(record.wanted))
            return None
        return (Atom("error"), Atom("not_loaded"), f"no instance of {model} runs here")

    def _serve_waiting(self) -> None:
        still = []
        for model, from_ in self._waiting:
            answer = self._route(model)
            if answer is None:
                still.append((model, from_))
            else:
                gen_server.reply(self.me, from_, answer)
        self._waiting = still

    def _path_of(self, name: str) -> Term:
        model = self._model_id(name)
        for record in self.records.values():
            if record.model == model and record.spec is not None:
                return (Atom("ok"), model, str(record.spec.path), record.spec.context_tokens)
        return (Atom("error"), Atom("not_loaded"), f"no instance of {model} runs here")

    # -- after a restart -------------------------------------------------------------------

    async def _when_tree_is_up(self, me: Process) -> None:
        me.send(self.me.pid, (Atom("running"), await bring_up.running_instances(me)))

    def _reconcile(self, running: list[Any]) -> None:
        """Take over what runs, start what should run but does not."""
        for spec, group, history in running:
            wanted = next(
                (w for w in self.desired.wanted if w.id == spec.id), Wanted(spec.id, spec.model)
            )
            record = Record(spec.id, spec.model, wanted, state="recovering", spec=spec)
            record.history, record.group = history, self.me.monitor(group)
            self.records[spec.id] = record
            self.me.send(Atom(spec.id), Atom("announce"))
        for wanted in self.desired.wanted:
            if wanted.id not in self.records:
                self.records[wanted.id] = Record(wanted.id, wanted.model, wanted)
                self._begin_again(self.records[wanted.id])
        self._serve_waiting()

    def _save(self, desired: Desired) -> None:
        self.desired = desired
        try:
            write_desired(self._path, desired)
        except OSError as exc:
            log.error("cannot write %s: %s; the change is lost at a restart", self._path, exc)

    def _describe(self, record: Record) -> dict[Any, Term]:
        known = (
            describe_spec(record.spec)
            if record.spec
            else {
                Atom("id"): record.id,
                Atom("model"): record.model,
                Atom("strategy"): Atom("single"),
                Atom("tensor_size"): 1,
                Atom("pipeline_size"): 1,
                Atom("engine"): record.wanted.options.engine or "torch",
            }
        )
        return {
            **known,
            Atom("state"): Atom(record.state),
            Atom("reason"): record.text,
            Atom("epoch"): record.epoch,
            Atom("restarts"): max(0, record.epoch - 1),
            Atom("active_requests"): 0,
            Atom("ranks"): [],
        }


async def find_server(me: Process, model: str, *, timeout_s: float) -> tuple[str, Pid]:
    """The instance that serves ``model`` and its coordinator, waiting for one that is coming up.

    Raises:
        UnknownModel: nothing is known by this name.
        NotReady: nothing serves it, or not within ``timeout_s``.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while True:
        left_s = deadline_s - loop.time()
        if left_s <= 0:
            raise NotReady(model, f"no instance became ready within {timeout_s:.0f} s")
        try:
            answer = await gen_server.call(
                me, Atom("scheduler"), (Atom("find"), model), timeout_s=left_s
            )
        except gen_server.CallTimeout:
            continue
        except gen_server.CallError:  # it is being restarted
            await asyncio.sleep(min(0.05, left_s))
            continue
        match answer:
            case ("ok", instance, Pid() as pid):
                return text_of(instance), pid
            case ("error", "unknown_model", text):
                raise UnknownModel(model, told=text_of(text))
            case ("error", _, text):
                raise NotReady(model, text_of(text))
