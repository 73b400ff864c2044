"""What both kinds of supervisor share: calls, exits, the restart budget, retries, the tree."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from typing import Final

from bridge import gen_server
from bridge.gen_server import GenServer, Stop
from bridge.process import Dest, Process
from bridge.process_errors import CallError
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from control.child import ERROR, RESTARTING, UNDEFINED, Child, offender, report
from control.restart import Budget, admit_restart
from control.spec import ChildType, SupSpec
from control.spec_check import BadSpec, check_child_specs, check_flags

_log: Final = logging.getLogger("control.supervisor")

SHUTDOWN: Final = Atom("shutdown")
NOT_FOUND: Final = (ERROR, Atom("not_found"))

_TREE_S: Final = 4.0  # for the whole tree; each level below has half of the one above


class SupervisorBase(GenServer):
    """A gen_server that answers ``supervisor``'s calls, from near and far."""

    def __init__(self, spec: SupSpec) -> None:
        self.spec = spec
        self._budget = Budget(spec.intensity, spec.period_s)
        self._restarts_s: tuple[int, ...] = ()

    async def init(self, me: Process) -> None:
        """Check the spec, then start the children. Fails with OTP's stop reasons."""
        me.trap_exit = True
        self._tag: Ref = me.make_ref()
        try:
            check_flags(self.spec)
        except BadSpec as exc:
            raise Stop((Atom("supervisor_data"), exc.reason)) from exc
        self._check_children()
        await self._start_children()

    def _check_children(self) -> None:
        try:
            check_child_specs(self.spec.children, self.spec.auto_shutdown)
        except BadSpec as exc:
            raise Stop((Atom("start_spec"), exc.reason)) from exc

    async def handle_call(self, request: Term, from_: Term) -> Term:
        """Answer as OTP's ``supervisor`` does; ``tree`` is ours."""
        match request:
            case Atom("which_children"):
                return self._which_children()
            case Atom("count_children"):
                return self._count_children()
            case Atom("tree"):
                self._answer_tree(from_, _TREE_S)
                return gen_server.NOREPLY
            case (Atom("tree"), int() as limit_ms):
                self._answer_tree(from_, min(limit_ms / 1000, _TREE_S))
                return gen_server.NOREPLY
            case (Atom("start_child"), what):
                return await self._start_child(what)
            case (Atom("terminate_child"), ident):
                return await self._terminate_child(ident)
            case (Atom("restart_child"), ident):
                return await self._restart_child(ident)
            case (Atom("delete_child"), ident):
                return self._delete_child(ident)
            case (Atom("get_childspec"), ident):
                return self._get_childspec(ident)
            case (Atom("which_child"), ident):
                return self._which_child(ident)
        return await super().handle_call(request, from_)

    async def handle_cast(self, message: Term) -> None:
        """Try a failed restart again: it came through the mailbox, so calls had their turn."""
        match message:
            case (Atom("try_again_restart"), tag, ident) if tag == self._tag:
                await self._try_again(ident)
            case _:
                await super().handle_cast(message)

    async def handle_info(self, message: Term) -> None:
        """A child ended."""
        match message:
            case (Atom("EXIT"), Pid() as pid, reason):
                await self._exited(pid, reason)
            case _:
                _log.error("supervisor received unexpected message: %s", show(message, 500))

    def format_state(self) -> Term:
        """What ``sys:get_state`` shows."""
        return self._tree_node(self._tree_children())

    @property
    def title(self) -> Term:
        """The supervisor as reports name it."""
        if self.me.name is not None:
            return Atom("local"), self.me.name
        return self.me.pid, Atom(type(self).__module__)

    # --- restarts

    def _admit(self, child: Child) -> bool:
        """Count a restart of ``child``; if it is one too many, report that."""
        now_s = asyncio.get_running_loop().time()
        self._restarts_s, allowed = admit_restart(self._restarts_s, now_s, self._budget)
        if not allowed:
            why = Atom("reached_max_restart_intensity")
            report(self.title, "shutdown", why, offender(child))
        return allowed

    def _retry(self, ident: Term) -> None:
        gen_server.cast(self.me, self.me.pid, (Atom("try_again_restart"), self._tag, ident))

    # --- the tree

    def _tree_node(self, children: list[Term]) -> Term:
        spec = self.spec
        return {
            Atom("name"): self.me.name or UNDEFINED,
            Atom("pid"): self.me.pid,
            Atom("type"): Atom("supervisor"),
            Atom("strategy"): Atom(spec.strategy),
            Atom("intensity"): spec.intensity,
            Atom("period_s"): spec.period_s,
            Atom("auto_shutdown"): Atom(spec.auto_shutdown),
            Atom("restarts_in_period"): len(self._restarts_s),
            Atom("children"): children,
        }

    def _tree_child(self, child: Child) -> dict[Term, Term]:
        process = self.me.node.process(child.pid) if isinstance(child.pid, Pid) else None
        state = "running" if isinstance(child.pid, Pid) else "stopped"
        return {
            Atom("id"): child.spec.id,
            Atom("name"): process.name if process and process.name else UNDEFINED,
            Atom("pid"): child.pid if isinstance(child.pid, Pid) else UNDEFINED,
            Atom("type"): Atom(child.spec.type),
            Atom("restart"): Atom(child.spec.restart),
            Atom("state"): RESTARTING if child.place_term == RESTARTING else Atom(state),
            Atom("restarts"): child.restarts,
        }

    def _answer_tree(self, from_: Term, limit_s: float) -> None:
        """Answer from a process of its own: a child supervisor may be slow, we may not."""
        children = self._tree_children()
        node = self._tree_node(children)

        async def body(asker: Process) -> None:
            loop = asyncio.get_running_loop()
            end_s = loop.time() + limit_s
            for child in children:
                is_supervisor = child[Atom("type")] == ChildType.SUPERVISOR
                if is_supervisor and child[Atom("state")] == "running":
                    await _descend(asker, child, min(end_s - loop.time(), limit_s / 2))
            gen_server.reply(asker, from_, node)

        self.me.node.spawn(body, label="supervisor tree")

    # --- what the two kinds do differently

    @abstractmethod
    async def _start_children(self) -> None: ...
    @abstractmethod
    async def _exited(self, pid: Pid, reason: Term) -> None: ...
    @abstractmethod
    async def _try_again(self, ident: Term) -> None: ...
    @abstractmethod
    def _tree_children(self) -> list[dict[Term, Term]]: ...
    @abstractmethod
    def _which_children(self) -> Term: ...
    @abstractmethod
    def _which_child(self, ident: Term) -> Term: ...
    @abstractmethod
    def _count_children(self) -> Term: ...
    @abstractmethod
    async def _start_child(self, what: Term) -> Term: ...
    @abstractmethod
    async def _terminate_child(self, ident: Term) -> Term: ...
    @abstractmethod
    async def _restart_child(self, ident: Term) -> Term: ...
    @abstractmethod
    def _delete_child(self, ident: Term) -> Term: ...
    @abstractmethod
    def _get_childspec(self, ident: Term) -> Term: ...


async def _descend(asker: Process, child: dict[Term, Term], limit_s: float) -> None:
    """Put the subtree of a child supervisor into its line, or say that it did not answer."""
    dest: Dest = child[Atom("pid")]
    request = Atom("tree"), int(max(limit_s, 0) * 1000)  # it must give up on its own children first
    try:
        subtree = await gen_server.call(asker, dest, request, timeout_s=max(limit_s, 0))
    except CallError:
        child[Atom("state")] = Atom("unresponsive")
        return
    if isinstance(subtree, dict):
        for key, value in subtree.items():
            child.setdefault(key, value)


def counts(specs: int, active: int, supervisors: int, workers: int) -> Term:
    """The answer of ``count_children``."""
    return [
        (Atom("specs"), specs),
        (Atom("active"), active),
        (Atom("supervisors"), supervisors),
        (Atom("workers"), workers),
    ]
