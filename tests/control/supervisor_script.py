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

import functools
from typing import Any

from hypothesis import strategies as st

from bridge.term import Atom, Term

A = Atom

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
ids = st.sampled_from(IDS)
indexes = st.integers(0, 5)


PLAIN: list[Term] = [
    *(A("ok") for _ in range(5)),
    A("info"),
    A("ignore"),
    (A("error"), A("busy")),
    (A("error"), (A("already_started"), A("other"))),
    (A("exit"), A("bad")),
]


@functools.cache  # building strategies costs more than drawing from them
def _queries(simple: bool) -> st.SearchStrategy[Term]:
    """Calls that no child plan is part of."""
    names = ["terminate_child", "restart_child", "delete_child", "get_childspec", "which_child"]
    by_id = st.tuples(st.sampled_from([A(name) for name in names]), ids)
    if not simple:
        return st.one_of(by_id, st.sampled_from([A("which_children"), A("count_children")]))
    by_pid = st.tuples(
        st.sampled_from([A(f"{name}_known") for name in ("terminate", "get", "which")]), indexes
    )
    return st.one_of(by_pid, by_pid, by_id, st.just(A("which_children")))


@functools.cache
def _starts(simple: bool) -> st.SearchStrategy[list[Term]]:
    plain = st.sampled_from(PLAIN)
    crash = st.tuples(st.just(A("crash")), indexes, st.sampled_from(CRASHES), plain)
    call = st.tuples(st.just(A("call")), _queries(simple), st.one_of(plain, crash))
    return st.lists(st.one_of(plain, plain, call, crash), max_size=5)


@functools.cache
def _plans(simple: bool, auto_shutdown: str) -> st.SearchStrategy[dict[Term, Any]]:
    often = "permanent" if auto_shutdown == "never" else "transient"
    restarts = st.sampled_from([A(r) for r in (often, "permanent", "transient", "temporary")])
    unset = st.just(None)
    drawn = st.tuples(
        st.integers(0, 1 << 30),
        ids,
        restarts,
        st.sampled_from(BEHAVIOURS),
        unset | st.sampled_from([A("brutal_kill"), 5000, A("infinity")]),
        unset | st.sampled_from([A("worker"), A("supervisor")]),
        unset | st.sampled_from([A("dynamic"), [A("m")], []]),
        st.sampled_from([True, True, False]),
        st.integers(0, 9),
        _starts(simple),
    )

    def plan(values: tuple[Any, ...]) -> dict[Term, Any]:
        key, ident, restart, behaviour, shutdown, kind, modules, significant, luck, starts = values
        if behaviour == "stubborn" and shutdown != "brutal_kill":
            shutdown = 2  # only a kill ends it
        if auto_shutdown == "never" or restart == "permanent":
            significant = None
        optional = {
            "shutdown": shutdown,
            "type": kind,
            "modules": modules,
            "significant": significant,
        }
        spec = {A("id"): ident, A("restart"): restart}
        spec |= {A(name): value for name, value in optional.items() if value is not None}
        return {
            A("key"): key,
            A("spec"): spec,
            A("starts"): [A("ok"), *starts] if simple or luck else starts,
            A("behaviour"): behaviour,
        }

    return drawn.map(plan)


@functools.cache
def _ops(simple: bool, auto_shutdown: str) -> tuple[st.SearchStrategy[Any], ...]:
    """Children to begin with, all ops, the op that adds a child, the stop at the end."""
    plans = _plans(simple, auto_shutdown)
    starts = st.tuples(st.just(A("start_simple" if simple else "start_child")), plans)
    call = st.tuples(st.just(A("call")), st.one_of(_queries(simple), starts))
    crash = st.tuples(st.just(A("crash")), indexes, st.sampled_from(CRASHES))
    kill = st.tuples(st.just(A("kill")), indexes)
    stop = st.tuples(st.just(A("stop")), st.sampled_from(REASONS))
    grow = st.tuples(st.just(A("call")), starts)
    op = st.one_of(crash, crash, kill, call, call, grow if simple else crash)
    return (
        st.lists(plans, min_size=int(simple), max_size=1 if simple else 4),
        st.lists(op, max_size=10),
        st.lists(grow, max_size=3 if simple else 0),
        st.lists(stop, max_size=1),
    )


@st.composite
def scripts(draw: st.DrawFn, *, simple: bool = False) -> Term:
    kinds = ["simple_one_for_one"] if simple else ["one_for_one", "one_for_all", "rest_for_one"]
    auto_kinds = ["never"] if simple else ["never", "any_significant", "all_significant"]
    auto_shutdown = draw(st.sampled_from(auto_kinds))
    flags = {
        A("strategy"): A(draw(st.sampled_from(kinds))),
        A("intensity"): draw(st.sampled_from([0, 1, 2, 3, 5, 8])),
        A("period"): 3600,  # no script lasts so long: its clock plays no part
        A("auto_shutdown"): A(auto_shutdown),
    }
    plans, ops, grow, stop = (draw(part) for part in _ops(simple, auto_shutdown))
    if not simple and draw(st.integers(0, 19)):  # else a duplicate id may refuse them all
        plans = list({repr(plan[A("spec")][A("id")]): plan for plan in plans}.values())
    ops = [*grow, *ops, *stop]
    if simple:  # every child is an instance of the one template
        same = {name: plans[0][name] for name in (A("spec"), A("behaviour"))}
        ops = [_instance(op, same) for op in ops]
    return flags, plans, ops


def _instance(op: Term, same: dict[Term, Any]) -> Term:
    match op:
        case (Atom("call"), (Atom("start_simple"), plan)):
            return A("call"), (A("start_simple"), {**plan, **same})
    return op
