"""What a supervisor does about an exit: pure rules, no clock, no process.

``supervisor.py`` and ``simple_supervisor.py`` own the state and carry these decisions out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from bridge.term import Atom, Term
from control.spec import AutoShutdown, Restart, Shutdown, Strategy

Id = TypeVar("Id")


@dataclass(frozen=True, slots=True)
class Budget:
    """At most ``max_restarts`` within any ``period_s`` whole seconds."""

    max_restarts: int = 1
    period_s: int = 5


class Verdict(Enum):
    """What an exit leads to."""

    RESTART = "restart"  # if the budget allows
    FORGET = "forget"  # a temporary child loses its spec, another keeps it without a process
    STOP_ALL = "stop_all"  # forget the child, then the supervisor ends with reason shutdown


def admit_restart(
    past_s: tuple[int, ...], now_s: float, budget: Budget
) -> tuple[tuple[int, ...], bool]:
    """Record a restart at ``now_s``; say whether the budget allows it.

    Args:
        past_s: allowed restarts so far, oldest first, whole seconds of a monotonic clock.
        now_s: the same clock; cut down to whole seconds, as OTP's clock is.

    Returns:
        ``(history, allowed)``; the history never holds more than ``max_restarts`` entries. Not
        allowed: stop the children, then self.

    Source: OTP 28 ``supervisor.erl``, ``add_restart/1``: a restart exactly ``period_s`` ago counts.
    """
    now_s = int(now_s // 1)
    recent_s = tuple(t for t in past_s if t >= now_s - budget.period_s)
    if len(recent_s) >= budget.max_restarts:
        return recent_s, False
    return (*recent_s, now_s), True


def is_abnormal(reason: Term) -> bool:
    """False for ``normal``, ``shutdown`` and ``{shutdown, _}``."""
    match reason:
        case Atom("normal") | Atom("shutdown") | (Atom("shutdown"), _):
            return False
    return True


def is_reported(restart: Restart, reason: Term) -> bool:
    """Whether an unasked exit is logged as ``child_terminated``: a permanent child's always is."""
    return restart == Restart.PERMANENT or is_abnormal(reason)


def after_exit(
    restart: Restart,
    reason: Term,
    *,
    significant: bool = False,
    auto_shutdown: AutoShutdown = AutoShutdown.NEVER,
    significant_left: bool = False,
) -> Verdict:
    """Decide about a child that ended unasked with ``reason``.

    Args:
        significant_left: another significant child runs or is about to be restarted.

    Source: OTP 28 ``supervisor.erl``, ``do_restart/3`` and ``do_auto_shutdown/2``.
    """
    if restart == Restart.PERMANENT or (restart == Restart.TRANSIENT and is_abnormal(reason)):
        return Verdict.RESTART
    if not significant or auto_shutdown == AutoShutdown.NEVER:
        return Verdict.FORGET
    if auto_shutdown == AutoShutdown.ALL_SIGNIFICANT and significant_left:
        return Verdict.FORGET
    return Verdict.STOP_ALL


def restart_group(strategy: Strategy, ids: Sequence[Id], failed: Id) -> tuple[Id, ...]:
    """The children that end and start again with ``failed``, itself included.

    Args:
        ids: all children in start order.

    Returns:
        In start order; they are stopped in the reverse of it.
    """
    match strategy:
        case Strategy.ONE_FOR_ALL:
            return tuple(ids)
        case Strategy.REST_FOR_ONE:
            return tuple(ids[ids.index(failed) :])
        case Strategy.ONE_FOR_ONE | Strategy.SIMPLE_ONE_FOR_ONE:
            return (failed,)


def shutdown_fault(restart: Restart, shutdown: Shutdown, reason: Term) -> Term | None:
    """The reason to report after a child was told to end and ended with ``reason``; None if fine.

    A permanent child that leaves as if by its own will is reported, others may.

    Source: OTP 28 ``supervisor.erl``, ``shutdown/1``.
    """
    asked = Atom("killed") if shutdown == "brutal_kill" else Atom("shutdown")
    if isinstance(reason, Atom) and reason == asked:
        return None
    if restart != Restart.PERMANENT and not is_abnormal(reason):
        return None
    return reason
