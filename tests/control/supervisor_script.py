"""Random scripts for a supervisor: what it is given and what then happens, one thing at a time.

A script is plain terms, so that the same one goes to OTP and to ours:

    (flags, plans, ops)
    plan: #{key, spec, starts, behaviour}
        key        unique in the script; names the child in the log
        spec       a child spec's map without ``start``
        starts     what its start function does the first, second, ... time; then ``ok``:
                   ok | info | ignore | {error, R} | {exit, R} | {call, Request, Start}
                   The last one first puts a call into the supervisor's mailbox.
        behaviour  plain: does not trap exits | {polite, R}: ends with R when told to (``same``:
                   with the reason it was told) | stubborn: only a kill ends it
    op: {crash, N, R} | {kill, N} | {call, Request} | {stop, R}; N picks a living child
"""

from __future__ import annotations

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


def _starts(draw: st.DrawFn, requests: st.SearchStrategy[Term], *, first_ok: bool) -> list[Term]:
    plain = st.one_of(
        st.just(A("ok")),
        st.just(A("ok")),
        st.sampled_from(
            [
                A("info"),
                A("ignore"),
                (A("error"), A("busy")),
                (A("error"), (A("already_started"), A("other"))),
                (A("exit"), A("bad")),
            ]
        ),
    )
    one = st.one_of(plain, plain, st.tuples(st.just(A("call")), requests, plain))
    starts = draw(st.lists(one, max_size=5))
    return [A("ok"), *starts] if first_ok else starts


@st.composite
def plans(
    draw: st.DrawFn, requests: st.SearchStrategy[Term], *, simple: bool, auto_shutdown: str
) -> Term:
    restart = draw(st.sampled_from(["permanent", "permanent", "transient", "temporary"]))
    behaviour = draw(st.sampled_from(BEHAVIOURS))
    spec: dict[Term, Term] = {A("id"): draw(ids), A("restart"): A(restart)}
    if behaviour == "stubborn":
        spec[A("shutdown")] = draw(st.sampled_from([A("brutal_kill"), 2]))
    elif draw(st.booleans()):
        spec[A("shutdown")] = draw(st.sampled_from([A("brutal_kill"), 5000, A("infinity")]))
    if draw(st.booleans()):
        spec[A("type")] = draw(st.sampled_from([A("worker"), A("supervisor")]))
    if draw(st.booleans()):
        spec[A("modules")] = draw(st.sampled_from([A("dynamic"), [A("m")], []]))
    if auto_shutdown != "never" and restart != "permanent":
        spec[A("significant")] = draw(st.booleans())
    first_ok = simple or draw(st.integers(0, 9)) > 0
    return {
        A("key"): draw(st.integers(0, 1 << 30)),
        A("spec"): spec,
        A("starts"): _starts(draw, requests, first_ok=first_ok),
        A("behaviour"): behaviour,
    }


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
    queries = _queries(simple)
    made = plans(queries, simple=simple, auto_shutdown=auto_shutdown)
    if simple:
        given = [draw(made)]
        behaviour = given[0][A("behaviour")]

        def like_template(plan: dict[Term, Any]) -> Term:
            return {**plan, A("spec"): given[0][A("spec")], A("behaviour"): behaviour}

        starts = st.tuples(st.just(A("start_simple")), made.map(like_template))
    else:
        unique = None if draw(st.integers(0, 19)) == 0 else _id_key  # sometimes a duplicate
        given = draw(st.lists(made, max_size=4, unique_by=unique))
        starts = st.tuples(st.just(A("start_child")), made)
    call = st.tuples(st.just(A("call")), st.one_of(queries, starts))
    crash = st.tuples(st.just(A("crash")), indexes, st.sampled_from(CRASHES))
    kill = st.tuples(st.just(A("kill")), indexes)
    stop = st.tuples(st.just(A("stop")), st.sampled_from(REASONS))
    grow = st.tuples(st.just(A("call")), starts)
    op = st.one_of(crash, crash, kill, call, call, grow if simple else crash)
    ops = draw(st.lists(op, max_size=10)) + draw(st.lists(stop, max_size=1))
    if simple:
        ops = [*draw(st.lists(grow, max_size=3)), *ops]
    return flags, given, ops


def _id_key(plan: dict[Term, Any]) -> str:
    return repr(plan[A("spec")][A("id")])
