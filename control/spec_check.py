"""OTP's check of supervisor and child specs: what it refuses is refused, with the same term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from bridge.process import Process
from bridge.process_errors import Exit
from bridge.term import Atom, ImproperList, MapPairs, Term
from control.errors import ControlError
from control.spec import (
    AutoShutdown,
    ChildSpec,
    ChildType,
    Restart,
    Shutdown,
    Start,
    Started,
    Strategy,
    SupSpec,
)


class BadSpec(ControlError):
    """A child or supervisor spec that OTP refuses; ``reason`` is the term OTP gives."""

    kind = "start_spec"

    def __init__(self, reason: Term) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"bad spec: {self.reason!r}. See supervisor's child_spec() and sup_flags()."


def check_flags(spec: SupSpec) -> None:
    """Check a supervisor's flags. Raises BadSpec with OTP's reason.

    Source: OTP 28 ``supervisor.erl``, ``do_check_flags/1``.
    """
    if spec.strategy not in list(Strategy):
        raise BadSpec((Atom("invalid_strategy"), spec.strategy))
    if not _is_count(spec.intensity):
        raise BadSpec((Atom("invalid_intensity"), spec.intensity))
    if not _is_count(spec.period_s) or spec.period_s == 0:
        raise BadSpec((Atom("invalid_period"), spec.period_s))
    if spec.auto_shutdown not in list(AutoShutdown):
        raise BadSpec((Atom("invalid_auto_shutdown"), spec.auto_shutdown))
    if spec.strategy == Strategy.SIMPLE_ONE_FOR_ONE and spec.auto_shutdown != AutoShutdown.NEVER:
        raise BadSpec(
            _bad_combination("auto_shutdown", Atom(spec.auto_shutdown), "strategy", spec.strategy)
        )


def check_child_specs(
    specs: Iterable[ChildSpec], auto_shutdown: AutoShutdown = AutoShutdown.NEVER
) -> None:
    """Check children and that no id occurs twice. Raises BadSpec with OTP's reason."""
    seen = set()
    for spec in specs:
        check_child_spec(spec, auto_shutdown)
        if (key := exact_key(spec.id)) in seen:
            raise BadSpec((Atom("duplicate_child_name"), spec.id))
        seen.add(key)


def check_child_spec(spec: ChildSpec, auto_shutdown: AutoShutdown = AutoShutdown.NEVER) -> None:
    """Check one child in OTP's order. Raises BadSpec with OTP's reason.

    Source: OTP 28 ``supervisor.erl``, ``do_check_childspec/2``.
    """
    if not isinstance(spec, ChildSpec):
        raise BadSpec((Atom("invalid_child_spec"), spec))
    if not callable(spec.start):
        raise BadSpec((Atom("invalid_mfa"), spec.start))
    if spec.restart not in list(Restart):
        raise BadSpec((Atom("invalid_restart_type"), spec.restart))
    if spec.significant is True and auto_shutdown == AutoShutdown.NEVER:
        raise BadSpec(_bad_combination("auto_shutdown", Atom("never"), "significant", True))
    if spec.significant is True and spec.restart == Restart.PERMANENT:
        raise BadSpec(_bad_combination("restart", Atom("permanent"), "significant", True))
    if not isinstance(spec.significant, bool):
        raise BadSpec((Atom("invalid_significant"), spec.significant))
    if spec.type not in list(ChildType):
        raise BadSpec((Atom("invalid_child_type"), spec.type))
    shutdown = spec.shutdown
    if not (_is_seconds(shutdown) or shutdown in ("brutal_kill", "infinity")):
        raise BadSpec((Atom("invalid_shutdown"), shutdown))
    if spec.modules is not None:
        _check_modules(spec.modules)


def child_spec_from_term(term: Term, auto_shutdown: AutoShutdown) -> ChildSpec:
    """A spec sent by Erlang: a map or the old 6-tuple. Raises BadSpec with OTP's reason.

    Its ``{M, F, Args}`` names code that this node does not have: starting it fails as a missing
    function does, and runs nothing.
    """
    match term:
        case (ident, start, restart, shutdown, kind, modules):
            given: Mapping[str, Term] = {
                "id": ident,
                "start": start,
                "restart": restart,
                "shutdown": shutdown,
                "type": kind,
                "modules": modules,
            }
        case dict():
            given = {str(key): value for key, value in term.items() if isinstance(key, Atom)}
        case _:
            raise BadSpec((Atom("invalid_child_spec"), term))
    for key in ("id", "start"):
        if key not in given:
            raise BadSpec(Atom(f"missing_{key}"))
    match given["start"]:
        case (Atom() as module, Atom() as function, list() as args):
            mfa = (module, function, args)
        case start:
            raise BadSpec((Atom("invalid_mfa"), start))
    spec = ChildSpec(
        id=given["id"],
        start=_missing_function(mfa),
        restart=given.get("restart", Restart.PERMANENT),
        significant=given.get("significant", False),
        type=given.get("type", ChildType.WORKER),
        mfa=mfa,
    )
    check_child_spec(spec, auto_shutdown)
    if "shutdown" in given:
        spec = replace(spec, shutdown_s=_shutdown_from_term(given["shutdown"]))
    if "modules" in given:
        _check_modules(given["modules"])
        spec = replace(spec, modules=given["modules"])
    return spec


def exact_key(term: Term) -> Term:
    """A hashable key that is equal where Erlang's ``=:=`` is: 1, 1.0 and true stay apart."""
    match term:
        case list():
            return list, tuple(map(exact_key, term))
        case ImproperList(items, tail):
            return ImproperList, exact_key(items), exact_key(tail)
        case MapPairs(pairs):
            return dict, frozenset((exact_key(k), exact_key(v)) for k, v in pairs)
        case tuple():
            return tuple, tuple(map(exact_key, term))
        case dict():
            return dict, frozenset((exact_key(k), exact_key(v)) for k, v in term.items())
        case Atom():
            return Atom, str(term)
        case str():
            return bytes, term.encode()
        case None:
            return Atom, "undefined"
        case float():
            return float, term.hex()
        case _:
            return type(term), term


def _missing_function(mfa: tuple[Atom, Atom, Term]) -> Start:
    module, function, args = mfa

    async def start(me: Process, *extra: Term) -> Started:
        called = [*args, *extra]
        raise Exit((Atom("undef"), [(module, function, called, [])]))

    return start


def _shutdown_from_term(term: Term) -> Shutdown:
    if _is_count(term):
        return float(term / 1000)
    if isinstance(term, Atom) and term in ("brutal_kill", "infinity"):
        return "brutal_kill" if term == "brutal_kill" else "infinity"
    raise BadSpec((Atom("invalid_shutdown"), term))


def _check_modules(modules: Term) -> None:
    if isinstance(modules, str) and modules == "dynamic":
        return
    if not isinstance(modules, list | tuple):
        raise BadSpec((Atom("invalid_modules"), modules))
    for module in modules:
        if not isinstance(module, str):
            raise BadSpec((Atom("invalid_module"), module))


def _bad_combination(key: str, value: Term, other_key: str, other: Term) -> Term:
    other = Atom(other) if isinstance(other, str) else other
    return Atom("bad_combination"), [(Atom(key), value), (Atom(other_key), other)]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
