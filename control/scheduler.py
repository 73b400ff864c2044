"""The registered process ``scheduler``: which instances should run, which do, who serves what.

================================================  ==========================================
call ``{load, Model, Options}``                   ``{ok, InstanceId}`` | ``{error, Kind, Text}``
call ``{place, Model, Options}``                  ``{ok, Map}``: what ``load`` would do
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
wait. What happens to instances is in ``instances``, who serves whom in ``finder``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import bring_up, dry_run
from control.books import Books, Record
from control.desired import Desired, DesiredFile, Wanted
from control.errors import ControlError, NotReady
from control.finder import Finder
from control.fleet import Fleet
from control.instance_spec import InstanceSpec
from control.instances import Instances, Terms
from control.load_options import LoadOptions
from control.lookup import Lookup, Resolved
from control.reconcile import Running

AT_ONCE = ("wanted", "instances")  # calls that need no complete books


class Scheduler(GenServer):
    """Keeps the books of instances.

    Args:
        desired_path: file of the desired state.
        terms: on what terms models run on this machine.
        autoload: load a known model on demand.
    """

    def __init__(self, lookup: Lookup, *, desired_path: Path, terms: Terms, autoload: bool) -> None:
        super().__init__()
        self._lookup, self._desired = lookup, DesiredFile(desired_path)
        self._terms, self._autoload = terms, autoload
        self.books = Books()
        self._early: list[tuple[Term, Term]] = []  # (request, From) from before the books were full
        self._complete = False
        self._leadership: Term = Atom("undefined")

    def format_state(self) -> Term:
        return {
            Atom("desired_version"): self._desired.now.version,
            Atom("default"): self._desired.now.default,
            Atom("leadership"): self._leadership,
            Atom("instances"): [(r.id, Atom(r.state), r.epoch) for r in self.books],
            Atom("waiting"): self._finder.num_waiting if self._complete else len(self._early),
        }

    async def init(self, me: Process) -> None:
        me.trap_exit = True
        self._desired.read()
        self._finder = Finder(
            me,
            self.books,
            self._desired,
            self._lookup,
            load=self._load_on_demand if self._autoload else None,
        )
        self._instances = Instances(
            me,
            self.books,
            self._desired,
            self._lookup,
            self._terms,
            on_change=self._finder.serve_waiting,
            on_demand_failed=self._finder.on_demand_failed,
        )
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
        desired = self._desired.now
        match request:
            case ("load", model, dict(options)):
                return self._load(text_of(model), LoadOptions.from_term(options), from_)
            case ("place", model, dict(options)):
                return self._place(text_of(model), LoadOptions.from_term(options), from_)
            case ("unload", instance):
                return self._instances.unload(text_of(instance), from_)
            case ("find", model):
                return self._finder.find(text_of(model), from_)
            case ("path", model):
                return self._finder.path_of(text_of(model))
            case ("set_default", model):
                self._desired.save(desired.with_default(self._resolve(model).id))
                return Atom("ok")
            case ("replace_default", old, new):
                if desired.default == text_of(old):
                    self._desired.save(desired.with_default(self._resolve(new).id))
                return Atom("ok")
            case "wanted":
                return [(w.id, w.model) for w in desired.wanted]
            case "forget_all":
                for record in self.books:
                    self._instances.unload(record.id, None)
                self._desired.save(Desired(self._desired.now.version + 1))
                return Atom("ok")
            case "instances":
                return [(r.coordinator or Atom("undefined"), r.describe()) for r in self.books]
            case _:
                return (Atom("error"), Atom("unknown_call"), f"scheduler: {show(request)}")

    async def handle_cast(self, message: Term) -> None:
        match message:
            case "stopping":
                self._instances.stopping = True
            case _:
                await super().handle_cast(message)

    async def handle_info(self, message: Term) -> None:
        instances = self._instances
        match message:
            case ("instance", id_, state, Pid() as pid, int(epoch), text, *_):
                instances.on_instance(text_of(id_), str(state), pid, epoch, text_of(text))
            case ("prepared", str(id_), InstanceSpec() as spec):
                instances.on_prepared(id_, spec)
            case ("started", str(id_), Pid() as group):
                instances.on_started(id_, group)
            case ("failed", str(id_), kind, text):
                instances.on_failed(id_, str(kind), text_of(text))
            case ("group_down", str(id_), bool(alone), reason):
                instances.on_group_judged(id_, alone, reason)
            case ("stopped", str(id_)):
                instances.on_stopped(id_)
            case ("running", list(found)):
                self._on_running(found)
            case ("DOWN", Ref() as monitor, _, _, reason):
                instances.on_down(monitor, reason)
            case ("leadership", leader, int(epoch), bool(sure), _):
                self._leadership = (leader, epoch, sure)  # each machine places its own as yet
            case ("EXIT", pid, reason):
                instances.on_worker_exit(pid, reason)
            case _:
                await super().handle_info(message)

    # -- orders ----------------------------------------------------------------------------

    def _load(self, ref: str, options: LoadOptions, from_: Term) -> Term:
        resolved = self._may_run(ref)
        wanted = Wanted("", ref, options)
        record = self._instances.begin(Record("", resolved.id, wanted), resolved)
        self._desired.save(self._desired.now.add(record.wanted))
        if resolved.path is None:
            return (Atom("ok"), record.id)
        record.reply_to = from_  # the files are here: a broken one is told to the caller
        return NOREPLY

    def _load_on_demand(self, model: str) -> None:
        resolved = self._may_run(self._lookup.card_of(model))
        record = Record("", resolved.id, Wanted("", model), on_demand=True)
        self._instances.begin(record, resolved)

    def _place(self, ref: str, options: LoadOptions, from_: Term) -> Term:
        resolved = self._may_run(ref)
        question = dry_run.Question(
            model=resolved.id,
            path=resolved.path,
            card=resolved.card,
            options=options,
            defaults=self._terms.defaults,
            fleet=Fleet.of_host(self._instances.host()),
        )
        work = partial(dry_run.answer, question=question, from_=from_)
        self.me.spawn(work, link=True, label=f"place {resolved.id}")
        return NOREPLY

    def _may_run(self, ref: str) -> Resolved:
        """Raises NotReady where this machine runs no models, UnknownModel."""
        if self._terms.refuse:
            raise NotReady(ref, self._terms.refuse, kind="no_compute")
        return self._resolve(ref)

    def _resolve(self, ref: Term) -> Resolved:
        return self._lookup.resolve(text_of(ref))

    # -- after a restart -------------------------------------------------------------------

    async def _find_running(self, me: Process) -> None:
        me.send(self.me.pid, (Atom("running"), await bring_up.running_instances(me)))

    def _on_running(self, running: list[Running]) -> None:
        """Take over what runs, then answer who waited."""
        self._instances.take_over(running)
        self._complete = True
        early, self._early = self._early, []
        for request, from_ in early:
            answer = self._answer(request, from_)
            if answer is not NOREPLY:
                gen_server.reply(self.me, from_, answer)
