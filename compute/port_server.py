"""The gen_server of a port: loads a model, takes requests, sends tokens straight back.

Messages (all terms; ids are integers, text is UTF-8 binaries):

======================================================  =====================================
call ``{prepare, Host}``                                ``{ok, #{holds => Group, place => Place}}``
call ``{load, #{...}}``                                 ``{ok, Facts}`` or ``{error, Kind, Text}``
call ``facts``                                          the map of ``Facts``
call ``{dial, Node}``                                   ``ok`` | ``{error, unreachable, Text}``
call ``{measure, Device, Threads}``                     ``{ok, WeightsPerS, FlopsPerS}``
call ``queue``                                          ``{ok, Load}`` or ``{error, Kind, Text}``
cast ``{submit, Requester, Ref, #{...}}``               tokens, then one ``done``
cast ``{cancel, Ref}``                                  the request ends as ``cancelled``
cast ``{own, Pid}``                                     beats go to ``Pid`` from now on; what an
                                                        earlier owner let through is dropped
cast ``warm_network``                                   imports what meeting other machines takes
cast ``stop``                                           the port ends
sends ``{admitted, Ref}``                              to the requester, before its first step
sends ``{token, Ref, Index, Id, LogProb, Top}``         to the requester
sends ``{done, Ref, Reason, Text, Info}``               to the requester
sends ``{beat, Port, Steps, Busy, Bytes}``              to the owner
sends ``{load_progress, Port, Done, Total}``            to the owner
======================================================  =====================================

``prepare`` reserves TCP ports on an address of this machine where the other ranks can meet this
one, and says which group of ranks it is loaded in already (empty text: none). Requests go to the
head of a mesh alone. A requester is monitored: when it dies, its requests are cancelled.

``grammar => #{kind, text, before}`` in a submit constrains its answer: ``models/constraint.py``. It
is compiled on a thread of its own before the request joins the batch, so that no stream waits.

``Reason`` is ``stop``, ``length``, ``error``, ``cancelled``, or ``busy``: so many requests wait
already that this one was not taken. ``Info`` is a map: ``cached_tokens`` of the prompt that did
not have to run again, and ``wait_s``, where busy, until there should be room. ``Load`` is a map of
what ``compute.worker.Load`` describes, under the same names; its ``wait_s`` is how long a request
that came now would wait for its first step, by the pace of the latest ones.

A port does not listen: ``dial`` makes it connect to a node that has something to say to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer, Stop
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from compute.engine_thread import EngineThread, Event
from compute.errors import BadRequest, GrammarFailed
from compute.follower import Follower
from compute.grammar_thread import GrammarThread
from compute.places import Listeners, place_term
from compute.port_chores import dial, import_engine, import_network
from compute.requests import LoadOrder, to_submit
from compute.worker import QUEUE_LIMIT, Done, Load, Submit, Token, Worker
from models.errors import ModelError

if TYPE_CHECKING:
    from compute.grammar import Grammars
    from compute.loading import Loaded

log = logging.getLogger("compute.port")

LEAVE_S = 1.0
CHUNK_TOKENS = 256  # of a step that prefills
PIPELINE_CHUNK_TOKENS = 64  # shorter, so that all stages soon have one


@dataclass(slots=True)
class _Live:
    """One request in the worker."""

    requester: Pid
    monitor: Ref


class PortServer(GenServer):
    """One rank. ``end(status)`` ends the OS process; it is passed in so that tests can watch it."""

    def __init__(self, port_id: str, *, end: Callable[[int], None]) -> None:
        super().__init__()
        self.port_id = port_id
        self.order: LoadOrder | None = None
        self.facts: dict[Any, Term] = {}
        self.owner: Pid | None = None
        self._end = end
        self._live: dict[Ref, _Live] = {}
        self._process = psutil.Process()
        self._thread = EngineThread(emit=self._from_thread(self._deliver), on_crash=self._crashed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: Listeners | None = None
        self._loaded: Loaded | None = None
        self._grammar_thread = GrammarThread(self._make_grammars)

    async def init(self, me: Process) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._thread.run(import_engine)

    def describe(self) -> dict[Any, Term]:
        """What the port says of itself when it meets its owner, new or old."""
        return {Atom("port_id"): self.port_id}

    def format_message(self, message: Term) -> Term:
        """Without the group of a load order, which is a secret."""
        match message:
            case (call, from_, ("load", dict())):
                return (call, from_, Atom("load"))
            case _:
                return message

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("prepare", str() | bytes() as host):
                return self._prepare(text_of(host))
            case ("load", dict(options)):
                return self._load(options, from_)
            case ("dial", Atom() as node):
                self.me.spawn(partial(dial, node, from_), link=True, label=f"dial {node}")
                return NOREPLY
            case "facts":
                return dict(self.facts)
            case ("measure", device, int(threads)) if self.order is None:
                return self._measure(text_of(device), threads, from_)
            case "queue":
                return self._queue(from_)
            case ("measure", _, _):
                return (Atom("error"), Atom("busy"), "this port holds a rank")
            case _:
                return await super().handle_call(request, from_)

    async def handle_cast(self, request: Term) -> None:
        match request:
            case ("submit", Pid() as requester, Ref() as ref, dict(options)):
                self._submit(requester, ref, options)
            case ("cancel", Ref() as ref):
                self._cancel(ref)
            case ("own", Pid() as owner):
                if self.owner not in (None, owner):
                    self._drop_all()
                self.owner = owner
            case "warm_network":
                if self.order is None:
                    self._thread.run(import_network)
            case "stop":
                raise Stop(Atom("normal"))
            case _:
                await super().handle_cast(request)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("DOWN", Ref() as monitor, "process", _, _):
                for ref, live in list(self._live.items()):
                    if live.monitor == monitor:
                        self._cancel(ref)
            case _:
                await super().handle_info(message)

    async def terminate(self, reason: Term) -> None:
        if self._listeners is not None:
            self._listeners.close()
        self._grammar_thread.close()
        if self._loaded is not None:
            left = asyncio.wrap_future(self._thread.run(self._leave))
            await asyncio.wait({left}, timeout=LEAVE_S)  # a step may take longer than we have

    def _leave(self) -> None:
        """Runs on the engine thread: tell the other ranks that this one goes."""
        self._thread.set_follower(None)
        self._thread.set_worker(None)
        if self._loaded is not None:
            self._loaded.links.close()
            self._loaded.stage.close()

    def beat(self) -> None:
        """Tell the owner that this rank lives, and how far it has come."""
        if self.owner is not None:
            self.me.send(
                self.owner,
                (
                    Atom("beat"),
                    self.me.pid,
                    self._thread.steps,
                    self._thread.busy,
                    self._process.memory_info().rss,
                ),
            )

    # -- loading ---------------------------------------------------------------------------

    def _prepare(self, host: str) -> Term:
        holds = self.order.group if self.order is not None and self.facts else ""
        if self._listeners is not None:
            self._listeners.close()
        try:
            self._listeners = Listeners(host)
        except OSError as exc:
            self._listeners = None
            text = f"cannot listen on {host}, where the other ranks should meet this one: {exc}"
            return (Atom("error"), Atom("bad_host"), text)
        place = place_term(self._listeners.place)
        return (Atom("ok"), {Atom("holds"): holds, Atom("place"): place})

    def _load(self, options: dict[Any, Term], from_: Term) -> Term:
        listeners, self._listeners = self._listeners, None
        answer = self._begin_load(options, listeners, from_)
        if answer is not NOREPLY and listeners is not None:
            listeners.close()  # nobody is to be met
        return answer

    def _begin_load(
        self, options: dict[Any, Term], listeners: Listeners | None, from_: Term
    ) -> Term:
        try:
            order = LoadOrder.from_term(options)
        except BadRequest as exc:
            return (Atom("error"), Atom("bad_order"), str(exc))
        if self.order is not None and self.facts and self.order.group == order.group:
            self.order = order  # adopted by a restarted control process: the weights stay
            return (Atom("ok"), dict(self.facts))
        if self.order is not None:
            return (Atom("error"), Atom("busy"), f"this port already holds {self.order.instance}")
        self.order = order
        future = self._thread.run(lambda: self._load_worker(order, listeners))
        asyncio.wrap_future(future).add_done_callback(lambda done: self._answer_load(done, from_))
        return NOREPLY

    def _load_worker(self, order: LoadOrder, listeners: Listeners | None) -> dict[Any, Term]:
        """Runs on the engine thread."""
        from compute.loading import facts, load  # the engines' libraries: not at start

        try:
            loaded = load(order, listeners, self._from_thread(self._progress))
        finally:
            if listeners is not None:
                listeners.close()
        self._loaded = loaded
        if loaded.engine is None:
            self._thread.set_follower(Follower(loaded.stage, loaded.links))
        else:
            worker = Worker(
                loaded.engine,
                prefill_chunk_tokens=order.prefill_chunk_tokens
                or (CHUNK_TOKENS if order.pipeline == 1 else PIPELINE_CHUNK_TOKENS),
                queue_limit=order.queue_limit or QUEUE_LIMIT,
                on_admitted=self._from_thread(self._admitted),
            )
            self._thread.set_worker(worker)
        return facts(loaded.stage)

    def _answer_load(self, done: asyncio.Future[dict[Any, Term]], from_: Term) -> None:
        error = done.exception()
        if error is None:
            self.facts = done.result()
            gen_server.reply(self.me, from_, (Atom("ok"), dict(self.facts)))
            return
        self.order = None
        kind = getattr(error, "kind", None) or "load_failed"
        gen_server.reply(self.me, from_, (Atom("error"), Atom(kind), str(error)))

    def _progress(self, done: int, total: int) -> None:
        if self.owner is not None:
            self.me.send(self.owner, (Atom("load_progress"), self.me.pid, done, total))

    # -- the device ------------------------------------------------------------------------

    def _measure(self, device: str, threads: int, from_: Term) -> Term:
        """About a second on the engine thread; an order to load waits for it."""

        def run() -> tuple[float, float]:
            from compute.device_speed import measure  # the engines' libraries: not at start

            return measure(device, threads=threads)

        def answered(done: asyncio.Future[tuple[float, float]]) -> None:
            error = done.exception()
            if error is None:
                gen_server.reply(self.me, from_, (Atom("ok"), *done.result()))
            else:
                kind = Atom(getattr(error, "kind", None) or "not_measured")
                gen_server.reply(self.me, from_, (Atom("error"), kind, str(error)))

        asyncio.wrap_future(self._thread.run(run)).add_done_callback(answered)
        return NOREPLY

    # -- requests --------------------------------------------------------------------------

    def _submit(self, requester: Pid, ref: Ref, options: dict[Any, Term]) -> None:
        if self._loaded is not None and self._loaded.engine is None:
            text = "this rank follows the head of its mesh: requests go there"
            self._done(requester, ref, Done(ref, "error", text))
            return
        try:
            request = to_submit(ref, options)
        except ValueError as exc:  # BadRequest, and what the sampler refuses
            self._done(requester, ref, Done(ref, "error", str(exc)))
            return
        log.debug("%s admitted", text_of(options.get("request_id", "")))
        self._live[ref] = _Live(requester, self.me.monitor(requester))
        if request.constraint is None or self._loaded is None:
            self._thread.submit(request)
        else:
            self._compile(ref, request)

    def _compile(self, ref: Ref, request: Submit) -> None:
        """Let the request join once its grammar is ready, if it is still wanted then."""

        def compiled(done: asyncio.Future[Submit]) -> None:
            if ref not in self._live or done.cancelled():
                return
            error = done.exception()
            if error is None:
                self._thread.submit(done.result())
                return
            known = isinstance(error, ModelError | GrammarFailed)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            self._deliver([Done(ref, "error", text)])

        asyncio.wrap_future(self._grammar_thread.compile(request)).add_done_callback(compiled)

    def _make_grammars(self) -> Grammars:
        """Runs on the grammars' thread."""
        from compute.grammar import Grammars
        from models.checkpoint import open_checkpoint

        assert self.order is not None  # a request is compiled only for a loaded model
        checkpoint = open_checkpoint(Path(self.order.path))
        return Grammars(checkpoint.tokenizer(), checkpoint.spec.vocab_size)

    def _queue(self, from_: Term) -> Term:
        """Answered between two steps."""
        if not self.facts or self._loaded is None or self._loaded.engine is None:
            text = "this port is not the head of a loaded model"
            return (Atom("error"), Atom("not_loaded"), text)

        def answered(done: asyncio.Future[Load | None]) -> None:
            load = done.result()
            if load is not None:
                told = {Atom(name): value for name, value in asdict(load).items()}
                gen_server.reply(self.me, from_, (Atom("ok"), told))

        asyncio.wrap_future(self._thread.run(self._thread.load)).add_done_callback(answered)
        return NOREPLY

    def _done(self, to: Pid, ref: Ref, end: Done) -> None:
        info = {Atom("cached_tokens"): end.cached_tokens, Atom("wait_s"): end.wait_s}
        self.me.send(to, (Atom("done"), ref, Atom(end.reason), end.text, info))

    def _cancel(self, ref: Ref) -> None:
        live = self._live.pop(ref, None)
        if live is not None:
            self.me.demonitor(live.monitor)
            self._thread.cancel(ref)
            self._done(live.requester, ref, Done(ref, "cancelled"))

    def _drop_all(self) -> None:
        """Who asked has seen the end of the earlier owner's group, and asks the next one."""
        for ref, live in self._live.items():
            self.me.demonitor(live.monitor)
            self._thread.cancel(ref)
        self._live.clear()

    def _admitted(self, refs: Sequence[Hashable]) -> None:
        """These are in a step from now on: if the rank dies of it, one of them may be why."""
        for ref in refs:
            live = self._live.get(ref)  # type: ignore[call-overload]  # ids are Refs here
            if live is not None:
                self.me.send(live.requester, (Atom("admitted"), ref))

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            live = self._live.get(event.request_id)  # type: ignore[call-overload]  # ids are Refs here
            if live is None:
                continue
            ref = event.request_id
            if isinstance(event, Token):
                logprob: Term = Atom("undefined") if event.logprob is None else event.logprob
                top = [(token_id, value) for token_id, value in event.top]
                self.me.send(
                    live.requester,
                    (Atom("token"), ref, event.index, event.token_id, logprob, top),
                )
            else:
                del self._live[ref]  # type: ignore[arg-type]
                self.me.demonitor(live.monitor)
                self._done(live.requester, ref, event)  # type: ignore[arg-type]

    # -- the other thread ------------------------------------------------------------------

    def _from_thread(self, function: Callable[..., None]) -> Callable[..., None]:
        """Make ``function`` callable from the engine thread; it runs on the event loop."""

        def hand_over(*args: object) -> None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(function, *args)

        return hand_over

    def _crashed(self, error: BaseException) -> None:
        """The engine thread died: this rank cannot know its state, so it ends."""
        import traceback

        traceback.print_exception(error)
        self._end(70)
