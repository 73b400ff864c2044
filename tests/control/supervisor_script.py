"""Random scripts for a supervisor: what it is given and what then happens, one thing at a time.

A script is plain terms, so that the same one goes to OTP and to ours:

    (flags, plans, ops)
    plan: #{key, spec, starts, behaviour}
        key        unique in the script; names the child in the log
        spec       a child spec's map without ``start``
        starts     what its start function does the first, second, ... time; then ``ok``:
                   ok | info | ignore | {error, R} | {exit, R} | {call, Request, Start} |
                   {crash, N, R, Start}. The last two first put a call into the supervisor's
                   mailbox, or end a living child, so that its exit signal waits there.
        behaviour  plain: does not trap exits | {polite, R}: ends with R when told to (``same``:
                   with the reason it was told) | stubborn: only a kill ends it
    op: {crash, N, R} | {kill, N} | {call, Request} | {stop, R}; N picks a living child
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

from bridge.term import Atom, Term

A = Atom
T = TypeVar("T")

IDS: list[Term] = [A("a"), A("b"), A("c"), 1, 1.0, (A("d"), [1]), b"e"]
REASONS: list[Term] = [A("normal"), A("shutdown"), (A("shutdown"), A("why")), A("boom")]
CRASHES: list[Term] = [*REASONS, A("boom"), (A("badmatch"), 1), A("noproc"), A("killed")]
BEHAVIOURS: list[Term] = [
    A("plain"),
    A("plain"),
    (A("polite"), A("same")),
    *((A("polite"), reason) for reason in [*REASONS, A("noproc")]),
    A("stubborn"),
]
FAILURES: list[Term] = [
    A("info"),
    A("ignore"),
    (A("error"), A("busy")),
    (A("error"), (A("already_started"), A("other"))),
    (A("exit"), A("bad")),
]
CALLS_BY_ID = [
    *(A(f"{name}_child") for name in ("terminate", "restart", "delete", "which")),
    A("get_childspec"),
]
CALLS_BY_PID = [A(f"{name}_known") for name in ("terminate", "get", "which")]


class Writer:
    """Makes a script of random bytes, one a decision: cheap to draw, and 0 is the plain choice."""

    def __init__(self, tape: bytes, *, simple: bool) -> None:
        self._tape = iter(tape)
        self._simple = simple
        self._keys = 0
        self._ids: list[Term] = []  # of the plans so far
        self.auto_shutdown = "never"

    def pick(self, among: Sequence[T]) -> T:
        return among[next(self._tape, 0) % len(among)]

    def chance(self, percent: int) -> bool:
        return next(self._tape, 0) > 255 - 2.56 * percent

    def script(self) -> Term:
        strategies = ["one_for_one", "one_for_all", "rest_for_one"]
        autos = ["never"] if self._simple else ["never", "any_significant", "all_significant"]
        self.auto_shutdown = self.pick(autos)
        flags = {
            A("strategy"): A("simple_one_for_one" if self._simple else self.pick(strategies)),
            A("intensity"): self.pick([3, 1, 2, 5, 8, 8, 0]),
            A("period"): 3600,  # no script lasts so long: its clock plays no part
            A("auto_shutdown"): A(self.auto_shutdown),
        }
        plans = [self.plan() for _ in range(1 if self._simple else self.pick([1, 2, 3, 4, 5]))]
        if not self._simple and not self.chance(5):  # else a duplicate id may refuse them all
            plans = list({repr(plan[A("spec")][A("id")]): plan for plan in plans}.values())
        ops = [self.grow() for _ in range(self.pick(range(4)) if self._simple else 0)]
        ops += [self.op() for _ in range(self.pick(range(16)))]
        if self.chance(30):
            ops.append((A("stop"), self.pick(REASONS)))
        if self._simple:  # every child is an instance of the one template
            same = {name: plans[0][name] for name in (A("spec"), A("behaviour"))}
            ops = [_instance(op, same) for op in ops]
        return flags, plans, ops

    def plan(self) -> dict[Term, Any]:
        often = "permanent" if self.auto_shutdown == "never" else "transient"
        restart = self.pick([often, "permanent", "transient", "temporary"])
        behaviour = self.pick(BEHAVIOURS)
        spec: dict[Term, Term] = {A("id"): self.pick(IDS), A("restart"): A(restart)}
        self._ids.append(spec[A("id")])
        if behaviour == "stubborn":  # only a kill ends it
            spec[A("shutdown")] = self.pick([A("brutal_kill"), 2])
        elif self.chance(50):
            spec[A("shutdown")] = self.pick([A("brutal_kill"), 5000, A("infinity")])
        if self.chance(50):
            spec[A("type")] = self.pick([A("worker"), A("supervisor")])
        if self.chance(50):
            spec[A("modules")] = self.pick([A("dynamic"), [A("m")], []])
        if self.auto_shutdown != "never" and restart != "permanent":
            spec[A("significant")] = not self.chance(30)
        starts = [self.start() for _ in range(self.pick(range(6)))]
        self._keys += 1
        return {
            A("key"): self._keys,
            A("spec"): spec,
            A("starts"): starts if not self._simple and self.chance(10) else [A("ok"), *starts],
            A("behaviour"): behaviour,
        }

    def start(self) -> Term:
        called = self.chance(35)
        outcome = self.pick(FAILURES) if self.chance(70 if called else 40) else A("ok")
        if self.chance(25):
            outcome = (A("crash"), self.pick(range(6)), self.pick(CRASHES), outcome)
        return (A("call"), self.query(), outcome) if called else outcome

    def query(self) -> Term:
        """A call that no child plan is part of."""
        if self.chance(15):
            return A("which_children")
        if self._simple and self.chance(60):
            return self.pick(CALLS_BY_PID), self.pick(range(6))
        if not self._simple and self.chance(10):
            return A("count_children")
        return self.pick(CALLS_BY_ID), self.pick(IDS if self.chance(15) else self._ids)

    def grow(self) -> Term:
        """A call that adds a child."""
        return A("call"), (A("start_simple" if self._simple else "start_child"), self.plan())

    def op(self) -> Term:
        if self.chance(45):
            return A("crash"), self.pick(range(6)), self.pick(CRASHES)
        if self.chance(20):
            return A("kill"), self.pick(range(6))
        return self.grow() if self.chance(30) else (A("call"), self.query())


def scripts(*, simple: bool = False) -> st.SearchStrategy[Term]:
    tapes = st.binary(min_size=200, max_size=400)
    return tapes.map(lambda tape: Writer(tape, simple=simple).script())


def _instance(op: Term, same: dict[Term, Any]) -> Term:
    match op:
        case (Atom("call"), (Atom("start_simple"), plan)):
            return A("call"), (A("start_simple"), {**plan, **same})
    return op
