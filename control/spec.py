"""What a supervisor is told: its flags and its children, as frozen data.

The words and defaults are those of OTP's ``supervisor``; ``spec_check.py`` refuses what it refuses.
Only ``start`` differs: a coroutine function instead of ``{M, F, Args}``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final, Literal, TypeAlias

from bridge.term import Atom, Pid, Term


class Strategy(StrEnum):
    """Which siblings a death takes along."""

    ONE_FOR_ONE = "one_for_one"
    ONE_FOR_ALL = "one_for_all"
    REST_FOR_ONE = "rest_for_one"
    SIMPLE_ONE_FOR_ONE = "simple_one_for_one"


class Restart(StrEnum):
    """Which deaths are followed by a new start."""

    PERMANENT = "permanent"  # all
    TRANSIENT = "transient"  # abnormal ones only
    TEMPORARY = "temporary"  # none


class ChildType(StrEnum):
    """What a child is; a supervisor's children are part of the tree."""

    WORKER = "worker"
    SUPERVISOR = "supervisor"


class AutoShutdown(StrEnum):
    """When the end of significant children ends the supervisor."""

    NEVER = "never"
    ANY_SIGNIFICANT = "any_significant"
    ALL_SIGNIFICANT = "all_significant"


class Ignore(Enum):
    """What a start function returns that started nothing on purpose."""

    IGNORE = "ignore"


IGNORE: Final = Ignore.IGNORE

Shutdown: TypeAlias = float | Literal["brutal_kill", "infinity"]
Started: TypeAlias = Pid | Ignore | tuple[Pid, Term]  # the tuple is OTP's ``{ok, Pid, Info}``
Start: TypeAlias = Callable[..., Awaitable[Started]]
Modules: TypeAlias = Sequence[str] | Literal["dynamic"]

WORKER_SHUTDOWN_S: Final = 5.0  # OTP's default


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """How to start, stop and restart one child.

    Attributes:
        id: any term, unique among siblings; appears in every report.
        start: called as ``await start(me)`` inside the supervisor's process ``me`` (with
            simple_one_for_one ``start(me, *args)``). It must start a process linked to ``me`` and
            return its pid, ``(pid, info)`` or IGNORE; whatever it raises means: not started.
        shutdown_s: seconds between the exit signal ``shutdown`` and the kill; ``"infinity"``
            waits for ever, ``"brutal_kill"`` kills at once. None: 5 s, a supervisor ``"infinity"``.
        significant: its end counts for the supervisor's ``auto_shutdown``.
        modules: None: the module of ``start``.
        mfa: ``{M, F, Args}`` shown to Erlang tools; None: made from ``start``.
    """

    id: Term
    start: Start
    restart: Restart = Restart.PERMANENT
    significant: bool = False
    shutdown_s: Shutdown | None = None
    type: ChildType = ChildType.WORKER
    modules: Modules | None = None
    mfa: tuple[str, str, Term] | None = None

    @property
    def shutdown(self) -> Shutdown:
        """``shutdown_s`` with its default filled in."""
        if self.shutdown_s is not None:
            return self.shutdown_s
        return "infinity" if self.type == ChildType.SUPERVISOR else WORKER_SHUTDOWN_S

    @property
    def mfargs(self) -> tuple[Atom, Atom, Term]:
        """The start function as OTP names one: ``{M, F, Args}``."""
        if self.mfa is not None:
            module, function, args = self.mfa
            return Atom(module), Atom(function), args
        module = getattr(self.start, "__module__", None) or "undefined"
        function = getattr(self.start, "__qualname__", None) or type(self.start).__qualname__
        return Atom(module), Atom(function[:255]), []

    @property
    def modules_term(self) -> Term:
        """``modules`` as OTP returns them: a list of atoms, or ``dynamic``."""
        if self.modules is None:
            return [self.mfargs[0]]
        if isinstance(self.modules, str):
            return Atom(self.modules)
        return [Atom(module) for module in self.modules]

    @property
    def shutdown_term(self) -> Term:
        """``shutdown`` as OTP returns it: milliseconds or an atom."""
        shutdown = self.shutdown
        return Atom(shutdown) if isinstance(shutdown, str) else round(shutdown * 1000)

    def to_term(self) -> Term:
        """The map that ``supervisor:get_childspec/2`` returns."""
        return {
            Atom("id"): self.id,
            Atom("start"): self.mfargs,
            Atom("restart"): Atom(self.restart),
            Atom("significant"): self.significant,
            Atom("shutdown"): self.shutdown_term,
            Atom("type"): Atom(self.type),
            Atom("modules"): self.modules_term,
        }

    def to_record(self, pid: Term = Atom("undefined")) -> Term:  # noqa: B008  # immutable
        """OTP's ``#child{}`` record, as errors of ``start_child`` carry it."""
        return (
            Atom("child"),
            pid,
            self.id,
            self.mfargs,
            Atom(self.restart),
            self.significant,
            self.shutdown_term,
            Atom(self.type),
            self.modules_term,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SupSpec:
    """A supervisor's flags and its children in start order.

    Attributes:
        intensity: restarts allowed within any ``period_s`` whole seconds; one more ends the
            supervisor. A period must be many times a child's start time, or the limit never trips.
        children: with simple_one_for_one exactly one, the template.
    """

    strategy: Strategy = Strategy.ONE_FOR_ONE
    intensity: int = 1
    period_s: int = 5
    children: tuple[ChildSpec, ...] = field(default=())
    auto_shutdown: AutoShutdown = AutoShutdown.NEVER
