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
call ``{add_key, Record}``                        ``ok``: an API key, as ``keys`` has it
call ``{revoke_key, Id}``                         ``ok`` | ``{error, not_found, Text}``
call ``keys``                                     list of records, without the keys
cast ``{tell_keys, Pid}``                         it gets ``{keys, Records, Revoked}``; so does
                                                  ``gateway`` here whenever they change
call ``wanted``                                   list of ``{InstanceId, Model}``
call ``forget_all``                               ``ok``: a machine alone wants nothing any more
cast ``stopping``                                 the node ends: what stops now did not fail
``{leadership, Leader, Epoch, IsSure, Roster}``   ``election``: who leads
``{node_up | node_down, Node}``                   ``membership``
``{instance, Id, State, Pid, Epoch, Text, Map}``  a coordinator, to every node
``{desired, Node, Message}``                      the same part of another node (``desired_sync``)
``{routes, Pid}``                                 another scheduler: tell it who serves here
``{wishes, Pid, Stamp, Body}``                    one that led another cluster, to the leader
``{wishes_taken, Stamp}``                         the leader has made them its own
================================================  ==========================================

The leader decides (``leading``); the others pass on what is asked of them, and answer ``find``
from what coordinators tell everybody. What takes long runs in processes of its own, so that this
one always answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Dest, Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import group_orders, place_question
from control.books import Books
from control.desired_state import DesiredState
from control.desired_sync import Document, Stamp
from control.errors import ControlError
from control.finder import Finder
from control.keys import key_term
from control.leading import Leading
from control.lookup import Lookup
from control.placement_request import Defaults
from control.quorum import Roster, missing, roster_of
from control.routes import Routes

log = logging.getLogger("control.scheduler")

TICK_S: Final = 1.0
LEADER_S: Final = 15.0  # that a question for the leader waits for one
FORWARD_S: Final = 1800.0
LOOK_S: Final = 2.0  # that somebody who looks at what runs waits for a leader that says nothing
ASK_S: Final = 5.0
MERGE_S: Final = 60.0  # from the end of its leading until a cluster is part of another
# What the leader answers. A question may be asked twice, should the first leader be lost.
ORDERS: Final = frozenset(
    {"load", "unload", "set_default", "replace_default", "add_key", "revoke_key"}
)
QUESTIONS: Final = frozenset({"place", "instances"})
NOT_LEADER: Final = Atom("not_leader")
_OK, _ERROR = Atom("ok"), Atom("error")


@dataclass(frozen=True, slots=True)
class _Early:
    """A request that waits for a leader, or for its books."""

    request: Term
    from_: Any
    since_s: float


class Scheduler(GenServer):
    """One node's part in running the cluster's instances.

    Args:
        desired_path: file of the desired state.
        defaults: for what load options leave open.
        autoload: load a known model on demand.
        now_s: a clock.
    """

    def __init__(
        self,
        lookup: Lookup,
        *,
        desired_path: Path,
        defaults: Defaults,
        autoload: bool,
        now_s: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()
        self._lookup, self._desired_path = lookup, desired_path
        self._defaults, self._autoload = defaults, autoload
        self._now_s = now_s or (lambda: asyncio.get_running_loop().time())
        self.books = Books()
        self._early: list[_Early] = []
        self._sure, self._roster = False, Roster("", (0, 0), ())
        self._leader, self._epoch, self._lineage = "", 0, ""
        self._before = (-math.inf, Document())  # when it last led, and what it wanted
        self._wishes: Document | None = None  # of the cluster that this node led before
        self._up: set[str] = set()

    def format_state(self) -> Term:
        return {
            Atom("desired_version"): self._desired.now.version,
            Atom("default"): self._desired.now.default,
            Atom("keys"): [key.id for key in self._desired.now.keys],
            Atom("leader"): Atom(self._leader or "undefined"),
            Atom("epoch"): self._epoch,
            Atom("leading"): self._leading.complete,
            Atom("up"): [Atom(node) for node in sorted(self._up)],
            Atom("instances"): [(r.id, Atom(r.state), r.epoch) for r in self.books],
            Atom("routes"): [(r.id, Atom(r.state), r.pid) for r in self._routes],
            Atom("waiting"): self._finder.num_waiting + len(self._early),
        }

    async def init(self, me: Process) -> None:
        me.trap_exit = True
        self._routes = Routes(me)
        self._desired = DesiredState(
            str(me.node.name),
            self._desired_path,
            send=self._tell_schedulers,
            on_ready=self._on_ready,
            on_safe=self._on_safe,
            on_keys=lambda: self._tell_keys((Atom("gateway"), me.node.name)),
        )
        self._desired.read()
        self._finder = Finder(
            me,
            self._routes,
            self.books,
            self._desired,
            self._lookup,
            now_s=self._now_s,
            load=self._load_on_demand if self._autoload else None,
        )
        self._leading = Leading(
            me,
            self.books,
            self._desired,
            self._routes,
            self._lookup,
            self._defaults,
            up=self._up,
            now_s=self._now_s,
            on_open=self._on_open,
            on_change=self._finder.serve_waiting,
            on_demand_failed=self._finder.on_demand_failed,
        )
        _, others = await gen_server.call(
            me, Atom("membership"), (Atom("subscribe"), me.pid), timeout_s=ASK_S
        )
        for node in others:
            self._node_up(text_of(node))
        gen_server.cast(me, Atom("election"), Atom("leadership"))
        self._spawn(_announce_local, "what runs here")
        self._tick_later()

    def _load_on_demand(self, model: str) -> None:
        self._leading.load_on_demand(model)

    # -- calls -----------------------------------------------------------------------------

    async def handle_call(self, request: Term, from_: Any) -> Term:
        match request:
            case "wanted":
                return [(w.id, w.model) for w in self._desired.now.wanted]
            case "keys":
                return [key_term(key) for key in self._desired.now.keys]
            case "forget_all":  # a machine that begins with no models unloads none of others
                self._leading.forget_all()
                return _OK
            case ("place_turn", id_):  # of a helper
                return self._leading.instances.place_turn(text_of(id_), from_)
            case ("find", model):
                return _guarded(lambda: self._finder.find(text_of(model), from_))
            case ("path", model):
                return _guarded(lambda: self._path_of(text_of(model), from_))
            case "instances" if not self._leading.complete and not self._elsewhere:
                return self._routed()
        name = request[0] if isinstance(request, tuple) and request else request
        if not isinstance(name, str) or name not in ORDERS | QUESTIONS:
            return (_ERROR, Atom("unknown_call"), f"scheduler: {show(request)}")
        if self._leading.complete and self._may_answer(request):
            return _guarded(lambda: self._leading.handle(request, from_))
        if from_[0].node == self.me.node.name:
            request = self._written_out(request)
        self._early.append(_Early(request, from_, self._now_s()))
        self._serve_early()
        return NOREPLY

    def _may_answer(self, request: Term) -> bool:
        """Whether this leader can: orders wait until it is sure that nobody else leads."""
        name = request[0] if isinstance(request, tuple) else request
        return self._sure or name in QUESTIONS

    def _path_of(self, name: str, from_: Term) -> Term:
        """Where this machine has what it takes to write to a model: tokenizer and template."""
        target = self._finder.target(name)
        route = next((r for r in self._routes if target in (r.id, r.model)), None)
        if route is None:
            return (_ERROR, Atom("not_loaded"), f"no instance of {target} runs here")
        here = str(self.me.node.name)
        nodes = sorted({*self._up, here}, key=lambda node: (node != route.pid.node, node))
        job = place_question.bring_header
        work = partial(job, target, route.model, route.context_tokens, nodes, from_)
        self._spawn(work, f"header of {route.model}")
        return NOREPLY

    def _routed(self) -> Term:
        """What this node knows by itself, while nobody leads."""
        return [
            (
                route.pid,
                {
                    Atom("id"): route.id,
                    Atom("model"): route.model,
                    Atom("state"): Atom(route.state),
                    Atom("epoch"): route.epoch,
                },
            )
            for route in self._routes
        ]

    # -- the leader is elsewhere -----------------------------------------------------------

    @property
    def _elsewhere(self) -> str:
        """The leader, if it is another node."""
        return "" if self._leader == self.me.node.name else self._leader

    def _written_out(self, request: Term) -> Term:
        """A relative path means nothing on another machine."""
        match request:
            case ("load" | "place" | "set_default" as what, model, *rest):
                try:
                    return (Atom(what), self._lookup.resolve(text_of(model)).id, *rest)
                except ControlError:
                    return request  # the leader may know it; else it says what is wrong
        return request

    def _serve_early(self) -> None:
        """Answer or pass on what waits for a leader."""
        if not self._leading.complete and not self._elsewhere:
            return
        early, self._early = self._early, []
        for one in early:
            if self._leading.complete and not self._may_answer(one.request):
                self._early.append(one)
            elif self._leading.complete:
                answer = _guarded(partial(self._leading.handle, one.request, one.from_))
                if answer is not NOREPLY:
                    gen_server.reply(self.me, one.from_, answer)
            elif one.from_[0].node != self.me.node.name:  # else it might go round for ever
                text = f"not this machine but {self._leader} leads"
                gen_server.reply(self.me, one.from_, (_ERROR, NOT_LEADER, text))
            else:
                self._spawn(partial(self._forward, one, self._elsewhere), "ask the leader")

    async def _forward(self, one: _Early, leader: str, me: Process) -> None:
        dest = (Atom("scheduler"), Atom(leader))
        timeout_s = LOOK_S if one.request == "instances" else FORWARD_S
        try:
            answer = await gen_server.node_call(me.node, dest, one.request, timeout_s=timeout_s)
        except gen_server.CallError as exc:
            if one.request == "instances" or one.request[0] in QUESTIONS:
                again = replace(one, since_s=self._now_s())  # from now on it waits for a leader
                me.send(self.me.pid, (Atom("ask_again"), again))
                return
            text = f"the leader {leader} was lost while it worked on this ({exc}); see `ctl status`"
            answer = (_ERROR, Atom("leader_lost"), text)
        match answer:
            case ("error", "not_leader", _):  # nothing was done
                me.send(self.me.pid, (Atom("ask_again"), one))
            case _:
                gen_server.reply(me, one.from_, answer)

    def _expire_early(self) -> None:
        early, self._early = self._early, []
        for one in early:
            if self._now_s() - one.since_s < LEADER_S:
                self._early.append(one)
                continue
            answer: Term = self._routed()
            if one.request != "instances":
                text = f"no machine may place: for {LEADER_S:.0f} s nobody led. See `ctl nodes`"
                if self._leading.complete:
                    why = missing(self._roster, self._up | {str(self.me.node.name)})
                    text = f"this machine may not place now: {why or 'too few answer it'}"
                answer = (_ERROR, Atom("no_leader"), text)
            gen_server.reply(self.me, one.from_, answer)

    # -- messages --------------------------------------------------------------------------

    async def handle_cast(self, message: Term) -> None:
        match message:
            case "stopping":
                self._leading.instances.stopping = True
            case ("tell_keys", Pid() as pid):
                self._tell_keys(pid)
            case _:
                await super().handle_cast(message)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("instance", id_, str(state), Pid() as pid, int(epoch), text, dict(known)):
                self._on_instance(text_of(id_), str(state), pid, epoch, text_of(text), known)
            case ("routes", Pid() as asker):
                for route in self._routes:
                    if route.pid.node == self.me.node.name:
                        self.me.send(route.pid, (Atom("announce"), asker))
            case ("leadership", leader, int(epoch), bool(sure), term):
                try:
                    roster = roster_of(term)
                except ValueError as exc:  # not of our election
                    log.warning("%s", exc)
                    return
                self._on_leadership(text_of(leader), epoch, sure, roster)
            case ("node_up", node):
                self._node_up(text_of(node))
            case ("node_down", node):
                self._node_down(text_of(node))
            case ("desired", sender, term):
                self._desired.hear(text_of(sender), term, leader=self._leader, epoch=self._epoch)
            case ("wishes", Pid() as sender, (int(epoch), int(version)), body):
                if self._leading.complete:
                    taken: Term = (Atom("wishes_taken"), (epoch, version))
                    done = partial(self.me.send, sender, taken)
                    self._leading.on_wishes(Document((epoch, version), body), done)
            case ("wishes_taken", stamp):
                self._wishes_taken(stamp)
            case ("relayed", target, answer):
                self._finder.on_relayed(text_of(target), answer)
            case ("ask_again", _Early("instances") as one):
                gen_server.reply(self.me, one.from_, self._routed())
            case ("ask_again", _Early() as one):
                self._early.append(one)  # the tick looks after it
                self._expire_early()
            case ("tick",):
                self._tick()
            case ("DOWN", Ref() as monitor, _, _, reason):
                self._on_down(monitor, reason)
            case ("EXIT", pid, reason):
                self._leading.instances.on_worker_exit(pid, reason)
            case _:
                if not self._leading.take(message):
                    await super().handle_info(message)

    def _tick(self) -> None:
        self._desired.tick()
        self._finder.tick()
        self._serve_early()
        self._expire_early()
        self._tell_wishes()
        self._tick_later()

    def _tick_later(self) -> None:
        self.me.send_after(TICK_S, self.me.pid, (Atom("tick"),))

    def _spawn(self, body: Callable[[Process], Any], label: str) -> None:
        self.me.spawn(body, link=True, label=label)

    def _tell_schedulers(self, nodes: Sequence[str], term: Term) -> None:
        for node in nodes:
            message = (Atom("desired"), self.me.node.name, term)
            self.me.send((Atom("scheduler"), Atom(node)), message)

    def _tell_keys(self, to: Dest) -> None:
        """Who may use the HTTP API of this node, as far as is known here."""
        now = self._desired.now
        records = [key_term(key) for key in now.keys]
        self.me.send(to, (Atom("keys"), records, list(now.revoked)))

    # -- coordinators ----------------------------------------------------------------------

    def _on_instance(
        self, id_: str, state: str, pid: Pid, epoch: int, text: str, known: dict[Any, Term]
    ) -> None:
        context = known.get("context_tokens", 0)
        tokens = context if isinstance(context, int) else 0
        model = text_of(known.get("model", b""))
        told = any(r.pid == pid and r.state == "draining" for r in self._routes)
        if self._routes.hear(id_, model, state, pid, epoch, tokens):
            if state == "draining" and not told:  # another place, ready for long, may be unknown
                for node in (str(self.me.node.name), *self._up):
                    self.me.send((Atom("scheduler"), Atom(node)), (Atom("routes"), self.me.pid))
            if self._leading.complete:
                self._leading.on_instance(id_, state, pid, epoch, text)
            self._finder.serve_waiting()

    def _on_down(self, monitor: Ref, reason: Term) -> None:
        route = self._routes.down(monitor)
        if route is not None:
            self._leading.instances.on_coordinator_down(route.pid)
        else:
            self._leading.on_down(monitor, reason)

    # -- machines and leaders --------------------------------------------------------------

    def _node_up(self, node: str) -> None:
        self._up.add(node)
        self._desired.node_up(node)
        self._leading.node_up(node)
        self.me.send((Atom("scheduler"), Atom(node)), (Atom("routes"), self.me.pid))

    def _node_down(self, node: str) -> None:
        self._up.discard(node)
        self._desired.node_down(node)
        self._leading.node_down(node)

    def _on_leadership(self, leader: str, epoch: int, sure: bool, roster: Roster) -> None:
        self._leader, self._epoch = "" if leader == "undefined" else leader, epoch
        self._sure, self._roster = sure, roster
        if self._leader != self.me.node.name and self._leading.complete:
            self._before = (self._now_s(), self._desired.document)
        if self._lineage and roster.lineage != self._lineage:
            led_s, document = self._before
            if self._now_s() - led_s < MERGE_S:
                self._wishes = document
        self._lineage = roster.lineage
        if self._leader != self.me.node.name:
            self._leading.step_down(f"{self._leader or 'nobody'} leads now; ask again")
            self._desired.follow()
        elif sure:
            self._leading.lead(epoch, roster)
            self._desired.lead(epoch, roster)
        # A leader that is unsure for a while keeps its books: it asks before it places anything.
        self._finder.follow(self._elsewhere, leading=self._leading.complete)
        self._serve_early()

    def _tell_wishes(self) -> None:
        """Two clusters have become one: what this one's wanted goes on being wanted."""
        if self._wishes is None:
            return
        if self._leading.complete:
            done = partial(self._wishes_taken, self._wishes.stamp)
            self._leading.on_wishes(self._wishes, done)
        elif self._elsewhere:
            told = (Atom("wishes"), self.me.pid, self._wishes.stamp, self._wishes.body)
            self.me.send((Atom("scheduler"), Atom(self._elsewhere)), told)

    def _wishes_taken(self, stamp: Term) -> None:
        if self._wishes is not None and self._wishes.stamp == stamp:
            self._wishes = None

    def _on_ready(self) -> None:
        version = self._desired.now.version
        gen_server.cast(self.me, Atom("election"), (Atom("commands_seen"), version))
        self._leading.on_ready()

    def _on_safe(self, stamp: Stamp) -> None:
        gen_server.cast(self.me, Atom("election"), (Atom("documents_safe"), stamp))

    def _on_open(self) -> None:
        self._finder.follow("", leading=True)
        self._serve_early()


def _guarded(work: Callable[[], Term]) -> Term:
    try:
        return work()
    except ControlError as exc:
        return (_ERROR, Atom(exc.kind), str(exc))


async def _announce_local(me: Process) -> None:
    """After a restart: coordinators of this machine say again how they are, to everybody."""
    for one in await group_orders.what_runs(me, str(me.node.name)) or ():
        me.send(Atom(one.spec.id), Atom("announce"))
