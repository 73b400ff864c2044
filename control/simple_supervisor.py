"""The simple_one_for_one supervisor: any number of like children, known by their pids alone.

Started by ``supervisor.start_link``. Its children are made by ``start_child`` with extra arguments
for the one template, and stopped all at once.

Source: OTP 28 ``supervisor.erl``, the clauses of ``simple_one_for_one`` and ``dyn_*``.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridge.gen_server import Stop
from bridge.process_errors import StartError
from bridge.term import Atom, Pid, Term
from control.child import (
    ERROR,
    OK,
    RESTARTING,
    Child,
    Restarting,
    end,
    launch,
    offender,
    offenders,
    report,
)
from control.restart import Verdict, after_exit, is_reported, shutdown_fault
from control.spec import ChildSpec, ChildType, Restart, SupSpec
from control.spec_check import exact_key
from control.supervisor_base import NOT_FOUND, SHUTDOWN, SupervisorBase, counts
from control.termination import end_children

_UNFIT = (ERROR, Atom("simple_one_for_one"))


@dataclass(slots=True)
class _Instance(Child):
    args: tuple[Term, ...] = ()


class SimpleSupervisor(SupervisorBase):
    """A supervisor of instances of one template."""

    def __init__(self, spec: SupSpec) -> None:
        super().__init__(spec)
        self._instances: dict[Pid | Restarting, _Instance] = {}

    @property
    def _template(self) -> ChildSpec:
        return self.spec.children[0]

    def _check_children(self) -> None:
        if len(self.spec.children) != 1:
            specs = [child.to_term() for child in self.spec.children]
            raise Stop((Atom("bad_start_spec"), specs))
        super()._check_children()

    async def _start_children(self) -> None:
        """None are started with the supervisor."""

    async def terminate(self, reason: Term) -> None:
        """Stop all instances at the same time; those that ended alike share one report."""
        template = self._template
        pids = [pid for pid in self._instances if isinstance(pid, Pid)]
        counted: dict[Term, tuple[Term, int]] = {}
        for _, ended in await end_children(self.me, pids, template.shutdown):
            fault = shutdown_fault(template.restart, template.shutdown, ended)
            if fault is not None:
                key = exact_key(fault)
                counted[key] = fault, counted.get(key, (fault, 0))[1] + 1
        self._instances.clear()
        for fault, count in counted.values():
            report(self.title, "shutdown_error", fault, offenders(template, count))

    # --- ends and restarts

    async def _exited(self, pid: Pid, reason: Term) -> None:
        instance = self._instances.get(pid)
        if instance is None:
            return
        restart = self._template.restart
        if is_reported(restart, reason):
            report(self.title, "child_terminated", reason, self._offender(instance))
        if after_exit(restart, reason) is Verdict.RESTART:  # never with auto_shutdown
            await self._restart(instance)
        else:
            del self._instances[pid]

    async def _try_again(self, ident: Term) -> None:
        match ident:
            case (Atom("restarting"), Pid() as old):
                instance = self._instances.get(Restarting(old))
                if instance is not None:
                    await self._restart(instance)

    async def _restart(self, instance: _Instance) -> None:
        place = instance.pid
        assert place is not None
        del self._instances[place]
        if not self._admit(instance):
            raise Stop(SHUTDOWN)
        try:
            launched = await launch(self.me, self._template, instance.args)
        except StartError as exc:
            old = place.old if isinstance(place, Restarting) else place
            report(self.title, "start_error", exc.reason, self._offender(instance))
            instance.pid = Restarting(old)
            self._instances[instance.pid] = instance
            self._retry((RESTARTING, old))
            return
        if launched.pid is not None:
            instance.pid = launched.pid
            instance.restarts += 1
            self._instances[launched.pid] = instance

    def _offender(self, instance: _Instance) -> list[Term]:
        return offender(instance, [*self._template.mfargs[2], *instance.args])

    # --- calls

    def _which_children(self) -> Term:
        # OTP's order for up to 32: pids as they were made, then those that are restarting.
        kind, modules = Atom(self._template.type), self._template.modules_term
        places = [i.place_term for i in self._instances.values() if isinstance(i.pid, Pid)]
        places += [RESTARTING] * (len(self._instances) - len(places))
        return [(Atom("undefined"), place, kind, modules) for place in places]

    def _which_child(self, ident: Term) -> Term:
        if not isinstance(ident, Pid):
            return _UNFIT
        instance = self._instances.get(ident)
        if instance is None:
            return NOT_FOUND
        return OK, (Atom("undefined"), *instance.entry[1:])

    def _count_children(self) -> Term:
        total = len(self._instances)
        active = sum(isinstance(place, Pid) for place in self._instances)
        supervisors = total if self._template.type == ChildType.SUPERVISOR else 0
        return counts(1, active, supervisors, total - supervisors)

    async def _start_child(self, what: Term) -> Term:
        if not isinstance(what, list):
            return ERROR, (Atom("badarg"), what)
        try:
            launched = await launch(self.me, self._template, what)
        except StartError as exc:
            return ERROR, exc.reason
        if launched.pid is not None:
            # As OTP: what is never started again does not keep its arguments.
            args = () if self._template.restart == Restart.TEMPORARY else tuple(what)
            self._instances[launched.pid] = _Instance(self._template, launched.pid, args=args)
        return launched.reply

    async def _terminate_child(self, ident: Term) -> Term:
        if not isinstance(ident, Pid):
            return _UNFIT
        place = ident if ident in self._instances else Restarting(ident)
        instance = self._instances.get(place)
        if instance is None:
            return NOT_FOUND if self._may_live(ident) else OK
        await end(self.me, self.title, instance)
        del self._instances[place]
        return OK

    def _may_live(self, pid: Pid) -> bool:
        return pid.node != self.me.node.name or self.me.node.process(pid) is not None

    async def _restart_child(self, ident: Term) -> Term:
        return _UNFIT

    def _delete_child(self, ident: Term) -> Term:
        return _UNFIT

    def _get_childspec(self, ident: Term) -> Term:
        known = exact_key(ident) == exact_key(self._template.id)
        if isinstance(ident, Pid):
            known = ident in self._instances or Restarting(ident) in self._instances
            known = known or not self._may_live(ident)
        return (OK, self._template.to_term()) if known else NOT_FOUND

    def _tree_children(self) -> list[dict[Term, Term]]:
        return [self._tree_child(instance) for instance in self._instances.values()]
