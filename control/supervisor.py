"""The supervisor: OTP's, at the level of messages, over the pure rules of ``restart.py``.

Children start in order and stop in reverse. A child that ends is started again with the siblings
its strategy names, as often as the budget allows; then the supervisor stops its children and ends
with ``shutdown``, and its own supervisor decides. Stock Erlang's ``supervisor:which_children/1``
and its kin work on it from any node.

Source: OTP 28 ``supervisor.erl``; ``tests/control/test_supervisor_vs_otp.py`` compares both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bridge import gen_server
from bridge.gen_server import Stop
from bridge.process import Dest, Process
from bridge.process_errors import StartError
from bridge.term import Atom, Pid, Term
from control.child import (
    ERROR,
    OK,
    RESTARTING,
    UNDEFINED,
    Child,
    Launched,
    Restarting,
    end,
    launch,
    offender,
    report,
    report_progress,
)
from control.restart import Verdict, after_exit, is_reported, restart_group
from control.simple_supervisor import SimpleSupervisor
from control.spec import ChildSpec, ChildType, Restart, Strategy, SupSpec
from control.spec_check import BadSpec, check_child_spec, child_spec_from_term, exact_key
from control.supervisor_base import NOT_FOUND, SHUTDOWN, SupervisorBase, counts

__all__ = [
    "Supervisor",
    "count_children",
    "delete_child",
    "get_childspec",
    "restart_child",
    "start_child",
    "start_link",
    "start_simple_child",
    "terminate_child",
    "tree",
    "which_children",
]


class Supervisor(SupervisorBase):
    """one_for_one, one_for_all and rest_for_one: children with ids, in an order."""

    def __init__(self, spec: SupSpec) -> None:
        super().__init__(spec)
        self._children: dict[Term, Child] = {}  # by exact key of the id, in start order

    async def _start_children(self) -> None:
        self._children = {exact_key(s.id): Child(s) for s in self.spec.children}
        failed = await self._start_group(list(self._children))
        if failed is not None:
            key, reason = failed
            ident = self._children[key].spec.id
            await self._end_group(list(self._children))
            raise Stop((SHUTDOWN, (Atom("failed_to_start_child"), ident, reason)))

    async def terminate(self, reason: Term) -> None:
        """Stop all children, last first."""
        await self._end_group(list(self._children))

    # --- groups

    async def _start_group(
        self, keys: Iterable[Term], *, again: bool = False
    ) -> tuple[Term, Term] | None:
        """Start in order; stop at the first failure: its ``(key, reason)``."""
        for key in keys:
            child = self._children[key]
            try:
                launched = await launch(self.me, child.spec)
            except StartError as exc:
                report(self.title, "start_error", exc.reason, offender(child))
                return key, exc.reason
            self._started(key, child, launched)
            child.restarts += again
        return None

    def _started(self, key: Term, child: Child, launched: Launched) -> None:
        child.pid = launched.pid
        if launched.pid is not None:
            report_progress(self.title, child)
        elif child.spec.restart == Restart.TEMPORARY:
            self._children.pop(key, None)

    async def _end_group(self, keys: list[Term]) -> None:
        """Stop in reverse order; temporary children are forgotten."""
        for key in reversed(keys):
            child = self._children[key]
            await end(self.me, self.title, child)
            self._forget(key)

    def _forget(self, key: Term) -> None:
        """Note that a child has no process: a temporary one loses its spec."""
        child = self._children[key]
        child.pid = None
        if child.spec.restart == Restart.TEMPORARY:
            del self._children[key]

    # --- ends and restarts

    async def _exited(self, pid: Pid, reason: Term) -> None:
        found = next((item for item in self._children.items() if item[1].pid == pid), None)
        if found is None:
            return  # a linked process that is no child, or no longer
        key, child = found
        spec = child.spec
        if is_reported(spec.restart, reason):
            report(self.title, "child_terminated", reason, offender(child))
        verdict = after_exit(
            spec.restart,
            reason,
            significant=spec.significant,
            auto_shutdown=self.spec.auto_shutdown,
            significant_left=any(
                other.spec.significant and other.pid is not None
                for other in self._children.values()
                if other is not child
            ),
        )
        if verdict is Verdict.RESTART:
            await self._restart(key)
            return
        self._forget(key)
        if verdict is Verdict.STOP_ALL:
            raise Stop(SHUTDOWN)

    async def _try_again(self, ident: Term) -> None:
        key = exact_key(ident)
        child = self._children.get(key)
        if child is not None and isinstance(child.pid, Restarting):
            await self._restart(key)

    async def _restart(self, key: Term) -> None:
        child = self._children[key]
        if not self._admit(child):
            self._forget(key)
            raise Stop(SHUTDOWN)
        old = child.pid
        if self.spec.strategy != Strategy.ONE_FOR_ONE:
            child.pid = None
        keys = list(restart_group(self.spec.strategy, list(self._children), key))
        await self._end_group([sibling for sibling in keys if sibling != key])
        failed = await self._start_group([k for k in keys if k in self._children], again=True)
        if failed is not None:
            failed_key, _ = failed
            known = old.old if isinstance(old, Restarting) else old
            self._children[failed_key].pid = Restarting(known if failed_key == key else None)
            self._retry(self._children[failed_key].spec.id)

    # --- calls

    def _which_children(self) -> Term:
        return [child.entry for child in reversed(self._children.values())]

    def _which_child(self, ident: Term) -> Term:
        child = self._children.get(exact_key(ident))
        return NOT_FOUND if child is None else (OK, child.entry)

    def _count_children(self) -> Term:
        children = self._children.values()
        supervisors = sum(child.spec.type == ChildType.SUPERVISOR for child in children)
        active = sum(_is_active(self.me, child.pid) for child in children)
        return counts(len(children), active, supervisors, len(children) - supervisors)

    async def _start_child(self, what: Term) -> Term:
        try:
            if isinstance(what, ChildSpec):
                check_child_spec(what, self.spec.auto_shutdown)
                spec = what
            else:
                spec = child_spec_from_term(what, self.spec.auto_shutdown)
        except BadSpec as exc:
            return ERROR, exc.reason
        key = exact_key(spec.id)
        present = self._children.get(key)
        if present is not None:
            if isinstance(present.pid, Pid):
                return ERROR, (Atom("already_started"), present.pid)
            return ERROR, Atom("already_present")
        child = Child(spec)
        try:
            launched = await launch(self.me, spec)
        except StartError as exc:
            match exc.reason:
                case (Atom("already_started"), _):
                    return ERROR, exc.reason
            return ERROR, (exc.reason, spec.to_record())
        if spec.restart == Restart.TEMPORARY:  # as OTP: never started again, so not kept
            module, function, _ = spec.mfargs
            child.spec = replace(spec, mfa=(module, function, UNDEFINED))
        self._children[key] = child
        self._started(key, child, launched)
        return launched.reply

    async def _terminate_child(self, ident: Term) -> Term:
        key = exact_key(ident)
        if key not in self._children:
            return NOT_FOUND
        await end(self.me, self.title, self._children[key])
        self._forget(key)
        return OK

    async def _restart_child(self, ident: Term) -> Term:
        key = exact_key(ident)
        refusal = self._refuse_living(key)
        if refusal is not None:
            return refusal
        child = self._children[key]
        try:
            launched = await launch(self.me, child.spec)
        except StartError as exc:
            return ERROR, exc.reason
        child.pid = launched.pid
        if launched.pid is not None:
            report_progress(self.title, child)
        return launched.reply

    def _delete_child(self, ident: Term) -> Term:
        key = exact_key(ident)
        refusal = self._refuse_living(key)
        if refusal is not None:
            return refusal
        del self._children[key]
        return OK

    def _refuse_living(self, key: Term) -> Term | None:
        """The error for a child that is unknown, runs or is about to; None for a stopped one."""
        child = self._children.get(key)
        if child is None:
            return NOT_FOUND
        if isinstance(child.pid, Restarting):
            return ERROR, RESTARTING
        return None if child.pid is None else (ERROR, Atom("running"))

    def _get_childspec(self, ident: Term) -> Term:
        child = self._children.get(exact_key(ident))
        return NOT_FOUND if child is None else (OK, child.spec.to_term())

    def _tree_children(self) -> list[dict[Term, Term]]:
        return [self._tree_child(child) for child in self._children.values()]


def _is_active(me: Process, pid: object) -> bool:
    if not isinstance(pid, Pid):
        return False
    return pid.node != me.node.name or me.node.process(pid) is not None


# --- the client side


async def start_link(
    parent: Process, spec: SupSpec, *, name: str | None = None, timeout_s: float | None = None
) -> Pid:
    """Start a supervisor linked to ``parent``; returns when all its children are started.

    Raises:
        StartError: with OTP's reasons, such as ``{shutdown, {failed_to_start_child, Id, Why}}``.
    """
    simple = spec.strategy == Strategy.SIMPLE_ONE_FOR_ONE
    server = SimpleSupervisor(spec) if simple else Supervisor(spec)
    return await gen_server.start_link(parent, server, name=name, timeout_s=timeout_s)


async def start_child(
    me: Process, supervisor: Dest, spec: ChildSpec, *, timeout_s: float | None = None
) -> Term:
    """Add and start a child of a supervisor of this node.

    Returns:
        ``{ok, Child}``, ``{ok, Child, Info}``, ``{ok, undefined}`` if it ignored the start,
        ``{error, already_present | {already_started, Pid} | Reason}``.
    """
    return await _call(me, supervisor, (Atom("start_child"), spec), timeout_s)


async def start_simple_child(
    me: Process, supervisor: Dest, args: list[Term], *, timeout_s: float | None = None
) -> Term:
    """Start one more child of a simple_one_for_one supervisor: ``start(me, *args)``."""
    return await _call(me, supervisor, (Atom("start_child"), args), timeout_s)


async def terminate_child(
    me: Process, supervisor: Dest, ident: Term, *, timeout_s: float | None = None
) -> Term:
    """Stop a child and keep its spec (a temporary one's goes). ``ok`` or ``{error, not_found}``."""
    return await _call(me, supervisor, (Atom("terminate_child"), ident), timeout_s)


async def restart_child(
    me: Process, supervisor: Dest, ident: Term, *, timeout_s: float | None = None
) -> Term:
    """Start a stopped child. As ``start_child``, or ``{error, running|restarting|not_found}``."""
    return await _call(me, supervisor, (Atom("restart_child"), ident), timeout_s)


async def delete_child(
    me: Process, supervisor: Dest, ident: Term, *, timeout_s: float | None = None
) -> Term:
    """Forget a stopped child. ``ok`` or ``{error, running|restarting|not_found}``."""
    return await _call(me, supervisor, (Atom("delete_child"), ident), timeout_s)


async def get_childspec(
    me: Process, supervisor: Dest, ident: Term, *, timeout_s: float | None = None
) -> Term:
    """``{ok, Map}`` of a child's spec, or ``{error, not_found}``."""
    return await _call(me, supervisor, (Atom("get_childspec"), ident), timeout_s)


async def which_children(
    me: Process, supervisor: Dest, *, timeout_s: float | None = None
) -> list[Term]:
    """``{Id, Pid | restarting | undefined, Type, Modules}`` of each child, youngest first."""
    answer: list[Term] = await _call(me, supervisor, Atom("which_children"), timeout_s)
    return answer


async def count_children(
    me: Process, supervisor: Dest, *, timeout_s: float | None = None
) -> dict[str, int]:
    """Numbers of ``specs``, ``active``, ``supervisors`` and ``workers``."""
    return dict(await _call(me, supervisor, Atom("count_children"), timeout_s))


async def tree(
    me: Process, supervisor: Dest, *, timeout_s: float | None = 30.0
) -> dict[Term, Term]:
    """The supervisor and all below it, oldest child first.

    A supervisor's map has ``name, pid, type, strategy, intensity, period_s, auto_shutdown,
    restarts_in_period, children``; a child's ``id, name, pid, type, restart, restarts`` and
    ``state``: ``running``, ``restarting``, ``stopped`` or (a child supervisor) ``unresponsive``.
    A running child supervisor's map has both. Keys are atoms.
    """
    answer: dict[Term, Term] = await _call(me, supervisor, Atom("tree"), timeout_s)
    return answer


async def _call(me: Process, supervisor: Dest, request: Term, timeout_s: float | None) -> Term:
    """Without a time-out by default, as OTP's: a start or a stop takes what the specs allow."""
    return await gen_server.call(me, supervisor, request, timeout_s=timeout_s)
