"""The registered process ``cluster``: what Erlang, ``ctl`` and the shells ask, as CONTRACT
section 4 lists it. Unknown calls are answered, never fatal; long ones run in processes
of their own, so that this one always answers.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import remote_generate
from control.cluster_api import ClusterApi
from control.errors import ControlError
from control.keys import key_of
from control.node_names import pick_node
from control.remote_generate import Options, usage_term

log = logging.getLogger("control.cluster")

STORE_S = 30.0
_OK = Atom("ok")
Job = Callable[[], Awaitable[Term]]


class Cluster(GenServer):
    """The facade.

    Args:
        api: the cluster's answers.
        stop: begins the end of this node; told whether to drop what runs.
    """

    def __init__(self, api: ClusterApi, *, stop: Callable[[bool], None]) -> None:
        super().__init__()
        self._api, self._stop = api, stop

    def format_state(self) -> Term:
        return {
            Atom("cluster"): self._api.cluster_name,
            Atom("requests_in_flight"): len(self._api.journal),
        }

    async def init(self, me: Process) -> None:
        me.trap_exit = True  # a failed job must not end the facade

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("EXIT", _, _):
                pass
            case _:
                await super().handle_info(message)

    async def handle_call(self, request: Term, from_: Term) -> Term:
        api = self._api
        match request:
            case "status":
                return self._spawn(from_, api.status_term)
            case "instances":
                return self._spawn(from_, api.instances)
            case "leader":
                return self._spawn(from_, self._leader)
            case "nodes":
                return self._forward(from_, "membership", Atom("nodes"))
            case "topology":
                return self._spawn(from_, api.topology_term)
            case "models":
                return self._spawn(from_, api.catalogue)
            case "tree":
                return self._spawn(from_, api.tree_term)
            case ("load", model):
                return self._spawn(from_, lambda: self._load(model, {}))
            case ("load", model, dict(options)):
                return self._spawn(from_, lambda: self._load(model, options))
            case ("unload", instance):
                return self._spawn(from_, lambda: self._unload(instance))
            case ("swap", old, new):
                return self._spawn(from_, lambda: self._swap(old, new))
            case ("place", model):
                return self._spawn(from_, lambda: self._place(model, {}))
            case ("place", model, dict(options)):
                return self._spawn(from_, lambda: self._place(model, options))
            case ("pull", model):
                return self._forward(from_, "model_store", (Atom("pull"), text_of(model)))
            case ("pull_progress", model):
                return self._forward(from_, "model_store", (Atom("progress"), text_of(model)))
            case ("pull", model, node):
                return self._spawn(from_, lambda: self._store_of(node, "pull", model))
            case ("pull_progress", model, node):
                return self._spawn(from_, lambda: self._store_of(node, "progress", model))
            case "keys":
                return self._spawn(from_, api.keys_term)
            case ("add_key", record):
                return self._spawn(from_, lambda: self._add_key(record))
            case ("revoke_key", id_):
                return self._spawn(from_, lambda: self._revoke_key(id_))
            case ("subscribe", Pid() as pid):
                return self._forward(from_, "events", (Atom("subscribe"), pid))
            case ("stop", bool(now)):
                self._stop(now)
                return _OK
            case ("generate", model, prompt, dict(options)):
                return self._generate(from_, text_of(model), prompt, options)
            case _:
                return await super().handle_call(request, from_)

    # -- jobs ------------------------------------------------------------------------------

    def _spawn(self, from_: Term, job: Job) -> Any:
        """Run ``job`` in a process of its own and answer with what it returns or raises."""

        async def run(me: Process) -> None:
            try:
                answer = await job()
            except ControlError as exc:
                answer = _error(exc)
            except gen_server.CallError as exc:  # a part of the tree is being restarted
                answer = (Atom("error"), Atom("unavailable"), f"{exc}; try again")
            except Exception as exc:
                log.exception("a call of cluster failed")
                answer = (Atom("error"), Atom("internal_error"), f"{type(exc).__name__}: {exc}")
                gen_server.reply(me, from_, answer)
                raise
            gen_server.reply(me, from_, answer)

        self.me.spawn(run, link=True, label="cluster call")
        return NOREPLY

    def _forward(self, from_: Term, name: str, request: Term) -> Any:
        async def ask() -> Term:
            return await gen_server.node_call(self.me.node, Atom(name), request, timeout_s=STORE_S)

        return self._spawn(from_, ask)

    async def _store_of(self, name: Term, call: str, model: Term) -> Term:
        """Ask the model store of another node, named in full or by its host."""
        node = self.me.node
        found = pick_node(text_of(name), [str(node.name), *map(str, node.nodes())])
        return await gen_server.node_call(
            node, ("model_store", found), (Atom(call), text_of(model)), timeout_s=STORE_S
        )

    async def _leader(self) -> Term:
        try:
            return await gen_server.node_call(
                self.me.node, Atom("election"), Atom("leader"), timeout_s=STORE_S
            )
        except gen_server.CallError:  # it is being restarted: nobody leads just now
            return (Atom("error"), Atom("no_leader"))

    async def _load(self, model: Term, options: dict[Any, Term]) -> Term:
        return (_OK, await self._api.load_with(text_of(model), options))

    async def _unload(self, instance: Term) -> Term:
        await self._api.unload(text_of(instance))
        return _OK

    async def _swap(self, old: Term, new: Term) -> Term:
        return (_OK, await self._api.swap(text_of(old), text_of(new)))

    async def _add_key(self, record: Term) -> Term:
        await self._api.add_key(key_of(record))
        return _OK

    async def _revoke_key(self, id_: Term) -> Term:
        await self._api.revoke_key(text_of(id_))
        return _OK

    async def _place(self, model: Term, options: dict[Any, Term]) -> Term:
        return (_OK, await self._api.place_with(text_of(model), options))

    # -- generate --------------------------------------------------------------------------

    def _generate(self, from_: Term, model: str, prompt: Term, raw: dict[Any, Term]) -> Any:
        try:
            options = Options.from_term(raw)
        except ControlError as exc:
            return _error(exc)
        watched = from_[0] if options.stream_to is None else options.stream_to
        answer = _Answer(from_)

        async def run(me: Process) -> None:
            """Own the answer; end the work when nobody waits for it any more."""
            gone = me.monitor(watched)
            worker, done = me.spawn_monitor(
                lambda worker: self._work(worker, answer, model, prompt, options),
                label="generate",
            )
            await me.receive(lambda m: m if _is_down(m, gone) or _is_down(m, done) else None)
            me.exit(worker, Atom("kill"))  # nothing happens if it has ended
            text = "the process that waits for it has ended, or the work failed; see the log"
            answer.give(me, (Atom("error"), Atom("cancelled"), text))

        self.me.spawn(run, link=True, label="generate for a process")
        return NOREPLY

    async def _work(
        self, me: Process, answer: _Answer, model: str, prompt: Term, options: Options
    ) -> None:
        """Generate: the answer whole, or as messages where the options name a receiver."""
        try:
            prepared = await remote_generate.prepare(self._api, model, prompt, options)
        except ControlError as exc:
            answer.give(me, _error(exc))
            return
        except gen_server.CallError as exc:
            answer.give(me, (Atom("error"), Atom("unavailable"), f"{exc}; try again"))
            return
        to, ref = options.stream_to, me.make_ref()
        if to is not None:
            answer.give(me, (_OK, ref))
        text, last = "", None
        async with aclosing(remote_generate.pieces(self._api, prepared)) as found:
            async for last in found:
                text += last.text
                if to is not None:
                    me.send(to, (Atom("phalanx"), ref, _message(last)))
        if last is None or last.reason == "error":
            why = last.error if last else "no answer"
            answer.give(me, (Atom("error"), Atom("generation"), why))
        else:
            answer.give(me, (_OK, text, usage_term(last.usage)))


class _Answer:
    """The one reply of a call that several processes work on."""

    def __init__(self, from_: Term) -> None:
        self._from = from_
        self._given = False

    def give(self, me: Process, term: Term) -> None:
        """Reply, unless that was done."""
        if not self._given:
            self._given = True
            gen_server.reply(me, self._from, term)


def _message(piece: remote_generate.Piece) -> Term:
    """``{token, N, Text}`` or ``{done, Reason, Usage}``."""
    if piece.reason is None:
        return (Atom("token"), piece.index, piece.text)
    usage = usage_term(piece.usage)
    if piece.error:
        usage[Atom("error")] = piece.error
    return (Atom("done"), Atom(piece.reason), usage)


def _error(exc: ControlError) -> Term:
    return (Atom("error"), Atom(exc.kind), str(exc))


def _is_down(message: Term, ref: Ref) -> bool:
    return isinstance(message, tuple) and message[:2] == ("DOWN", ref)
