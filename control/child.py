"""One child as its supervisor keeps it, how it is started, and the reports about it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from bridge.process import Process
from bridge.process_errors import Exit, StartError
from bridge.runner import crash_reason
from bridge.term import Atom, Pid, Term
from control.restart import shutdown_fault
from control.spec import ChildSpec, Ignore
from control.termination import end_child

_log: Final = logging.getLogger("control.supervisor")

UNDEFINED: Final = Atom("undefined")
OK: Final = Atom("ok")
ERROR: Final = Atom("error")
RESTARTING: Final = Atom("restarting")


@dataclass(frozen=True, slots=True)
class Restarting:
    """In place of a pid: the last restart failed, another try is on its way."""

    old: Pid | None


Place: TypeAlias = Pid | Restarting | None  # None: no process, and none is coming


@dataclass(slots=True)
class Child:
    """A spec, the process that runs it now, and how often it was started again."""

    spec: ChildSpec
    pid: Place = None
    restarts: int = 0

    @property
    def place_term(self) -> Term:
        """As ``which_children`` shows it: a pid, ``restarting`` or ``undefined``."""
        return RESTARTING if isinstance(self.pid, Restarting) else self.pid or UNDEFINED

    @property
    def entry(self) -> Term:
        """``{Id, Child, Type, Modules}``."""
        return self.spec.id, self.place_term, Atom(self.spec.type), self.spec.modules_term


@dataclass(frozen=True, slots=True)
class Launched:
    """A start that did not fail; ``pid`` is None if the start function ignored it."""

    pid: Pid | None
    info: tuple[Term, ...] = ()

    @property
    def reply(self) -> Term:
        """What ``start_child`` answers: ``{ok, Child}`` or ``{ok, Child, Info}``."""
        return OK, self.pid or UNDEFINED, *self.info


async def launch(me: Process, spec: ChildSpec, args: Sequence[Term] = ()) -> Launched:
    """Run the start function of ``spec`` in the supervisor's process ``me``.

    Raises:
        StartError: it failed; ``reason`` is what OTP puts into ``{error, Reason}``.
    """
    try:
        started = await spec.start(me, *args)
    except StartError:
        raise
    except Exception as exc:
        if not me.alive:
            raise  # not the child failed: this supervisor was killed meanwhile
        reason = exc.reason if isinstance(exc, Exit) else crash_reason(exc)
        raise StartError((Atom("EXIT"), reason)) from exc
    match started:
        case Pid():
            return Launched(started)
        case Ignore():
            return Launched(None)
        case (Pid() as pid, info):
            return Launched(pid, (info,))
    raise StartError((Atom("bad_return_value"), repr(started).encode("utf-8", "replace")))


async def end(me: Process, supervisor: Term, child: Child) -> None:
    """End the process of ``child``, if any; report an end that was not the one asked for."""
    if not isinstance(child.pid, Pid):
        return
    reason = await end_child(me, child.pid, child.spec.shutdown)
    fault = shutdown_fault(child.spec.restart, child.spec.shutdown, reason)
    if fault is not None:
        report(supervisor, "shutdown_error", fault, offender(child))


def offender(child: Child, args: Term | None = None) -> list[Term]:
    """``child`` as supervisor reports show it."""
    old = child.pid.old if isinstance(child.pid, Restarting) else None
    place = (RESTARTING, old or UNDEFINED) if child.place_term == RESTARTING else child.place_term
    return _offender([(Atom("pid"), place)], child.spec, args)


def offenders(spec: ChildSpec, count: int) -> list[Term]:
    """``count`` children of one template, as one report shows them."""
    return _offender([(Atom("nb_children"), count)], spec, None)


def _offender(head: list[Term], spec: ChildSpec, args: Term | None) -> list[Term]:
    module, function, own_args = spec.mfargs
    return [
        *head,
        (Atom("id"), spec.id),
        (Atom("mfargs"), (module, function, own_args if args is None else args)),
        (Atom("restart_type"), Atom(spec.restart)),
        (Atom("significant"), spec.significant),
        (Atom("shutdown"), spec.shutdown_term),
        (Atom("child_type"), Atom(spec.type)),
    ]


def report(supervisor: Term, context: str, reason: Term, offender: list[Term]) -> None:
    """Log what OTP's SUPERVISOR REPORT says, with its four fields also as attributes.

    Args:
        context: ``start_error``, ``child_terminated``, ``shutdown_error`` or ``shutdown``.
    """
    shown = dict(offender)
    _log.error(
        "supervisor report: supervisor %s, errorContext %s, reason %r, offender %r at %s",
        supervisor[1] if supervisor[0] == "local" else supervisor[0],
        context,
        reason,
        shown[Atom("id")],
        shown.get(Atom("pid"), shown.get(Atom("nb_children"))),
        extra={
            "supervisor": supervisor,
            "errorContext": context,
            "reason": reason,
            "offender": offender,
        },
    )


def report_progress(supervisor: Term, child: Child) -> None:
    """Log that ``child`` was started, as OTP's PROGRESS REPORT."""
    _log.debug(
        "progress report: supervisor %s, started %r at %s",
        supervisor[1] if supervisor[0] == "local" else supervisor[0],
        child.spec.id,
        child.pid,
        extra={"supervisor": supervisor, "started": offender(child)},
    )
