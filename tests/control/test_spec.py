"""Specs as data: defaults, OTP's terms for them, and refusals."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.process import Process
from bridge.process_errors import Exit
from bridge.term import Atom, ImproperList, MapPairs, Pid, Term
from control.spec import AutoShutdown, ChildSpec, ChildType, Restart, Started, Strategy, SupSpec
from control.spec_check import (
    BadSpec,
    check_child_specs,
    check_flags,
    child_spec_from_term,
    exact_key,
)


async def start(me: Process) -> Pid:
    raise AssertionError("only named here")


async def _await(started: Awaitable[Started]) -> Started:
    return await started


def test_defaults_are_those_of_otp() -> None:
    worker, boss = (
        ChildSpec(id=1, start=start),
        ChildSpec(id=2, start=start, type=ChildType.SUPERVISOR),
    )
    assert (worker.restart, worker.significant) == (Restart.PERMANENT, False)
    assert (worker.shutdown_term, boss.shutdown_term) == (5000, Atom("infinity"))
    flags = SupSpec()
    assert (flags.strategy, flags.intensity, flags.period_s) == (Strategy.ONE_FOR_ONE, 1, 5)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ChildSpec(id=1, start=start).id = 2  # type: ignore[misc]


def test_erlang_sees_the_start_function_by_its_module_and_name() -> None:
    term = ChildSpec(id=b"x", start=start, shutdown_s=0.25).to_term()
    assert term == {
        Atom("id"): b"x",
        Atom("start"): (Atom(__name__), Atom("start"), []),
        Atom("restart"): Atom("permanent"),
        Atom("significant"): False,
        Atom("shutdown"): 250,
        Atom("type"): Atom("worker"),
        Atom("modules"): [Atom(__name__)],
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"start": 7}, (Atom("invalid_mfa"), 7)),
        ({"restart": "often"}, (Atom("invalid_restart_type"), "often")),
        ({"type": "boss"}, (Atom("invalid_child_type"), "boss")),
        ({"shutdown_s": -1}, (Atom("invalid_shutdown"), -1)),
        ({"shutdown_s": True}, (Atom("invalid_shutdown"), True)),
        ({"modules": 3}, (Atom("invalid_modules"), 3)),
        ({"modules": [3]}, (Atom("invalid_module"), 3)),
        ({"significant": 1}, (Atom("invalid_significant"), 1)),
        (
            {"significant": True},
            (
                Atom("bad_combination"),
                [(Atom("auto_shutdown"), Atom("never")), (Atom("significant"), True)],
            ),
        ),
    ],
)
def test_a_bad_child_is_refused(changes: dict[str, Any], reason: Term) -> None:
    with pytest.raises(BadSpec) as caught:
        check_child_specs([ChildSpec(**{"id": 1, "start": start, **changes})])
    assert caught.value.reason == reason


def test_a_permanent_child_cannot_be_significant() -> None:
    spec = ChildSpec(id=1, start=start, significant=True)
    with pytest.raises(BadSpec, match="bad_combination"):
        check_child_specs([spec], AutoShutdown.ANY_SIGNIFICANT)


def test_ids_are_told_apart_as_erlang_does() -> None:
    check_child_specs(
        [ChildSpec(id=ident, start=start) for ident in (1, 1.0, True, b"1", Atom("1"))]
    )
    with pytest.raises(BadSpec, match="duplicate_child_name"):
        check_child_specs([ChildSpec(id=ident, start=start) for ident in ("a", b"a")])


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"strategy": "all"}, "invalid_strategy"),
        ({"intensity": -1}, "invalid_intensity"),
        ({"intensity": 1.5}, "invalid_intensity"),
        ({"period_s": 0}, "invalid_period"),
        ({"auto_shutdown": "some"}, "invalid_auto_shutdown"),
        ({"strategy": "simple_one_for_one", "auto_shutdown": "any_significant"}, "bad_combination"),
    ],
)
def test_bad_flags_are_refused(flags: dict[str, Any], word: str) -> None:
    with pytest.raises(BadSpec, match=word):
        check_flags(SupSpec(**flags))


def test_code_that_erlang_names_is_not_there() -> None:
    term = {Atom("id"): 1, Atom("start"): (Atom("os"), Atom("cmd"), [[108, 115]])}
    spec = child_spec_from_term(term, AutoShutdown.NEVER)
    with pytest.raises(Exit) as caught:
        asyncio.run(_await(spec.start(None)))
    assert caught.value.reason == (Atom("undef"), [(Atom("os"), Atom("cmd"), [[108, 115]], [])])


atoms = st.sampled_from([Atom("a"), True, False, Atom("undefined")])
terms: st.SearchStrategy[Term] = st.recursive(
    st.one_of(atoms, st.integers(-1, 2), st.sampled_from([0.0, -0.0, 1.0]), st.binary(max_size=2)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.integers(0, 2), inner, max_size=2),
        st.builds(ImproperList, st.tuples(inner), st.integers(0, 1)),
        st.builds(MapPairs, st.tuples(st.tuples(inner, inner))),
    ),
    max_leaves=6,
)


@given(terms, terms)
def test_every_term_can_be_an_id(left: Term, right: Term) -> None:
    assert hash(exact_key(left)) == hash(exact_key(left))
    if exact_key(left) == exact_key(right):
        assert left == right
