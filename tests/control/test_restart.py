"""The pure restart rules, as tables and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.term import Atom, Term
from control.restart import (
    Budget,
    Verdict,
    admit_restart,
    after_exit,
    is_abnormal,
    is_reported,
    restart_group,
    shutdown_fault,
)
from control.spec import AutoShutdown, Restart, Shutdown, Strategy

NORMAL, SHUTDOWN, KILLED, BOOM = map(Atom, ("normal", "shutdown", "killed", "boom"))
WHY = (SHUTDOWN, Atom("why"))


@pytest.mark.parametrize(
    ("past_s", "allowed"),
    [
        ((), True),
        ((1,), True),
        ((1, 2), False),
        ((-2, 3), False),  # exactly period_s ago still counts
        ((-3, 3), True),
        ((-9, -8), True),
    ],
)
def test_budget_counts_only_restarts_inside_the_period(
    past_s: tuple[int, ...], allowed: bool
) -> None:
    history, ok = admit_restart(past_s, now_s=3.9, budget=Budget(max_restarts=2, period_s=5))
    assert ok is allowed
    assert (history[-1:] == (3,)) is allowed or not allowed


def test_a_budget_of_none_admits_none() -> None:
    assert admit_restart((), 0.0, Budget(0, 5)) == ((), False)


@given(st.lists(st.floats(0, 60), max_size=40).map(sorted), st.integers(0, 5), st.integers(1, 20))
def test_history_is_bounded_and_every_window_keeps_the_budget(
    times_s: list[float], max_restarts: int, period_s: int
) -> None:
    budget = Budget(max_restarts, period_s)
    history: tuple[int, ...] = ()
    admitted = []
    for now_s in times_s:
        history, ok = admit_restart(history, now_s, budget)
        assert len(history) <= max_restarts
        if not ok:
            break
        admitted.append(int(now_s))
        window = [t for t in admitted if admitted[-1] - t <= period_s]
        assert len(window) <= max_restarts


@pytest.mark.parametrize(
    ("reason", "abnormal"),
    [
        (NORMAL, False),
        (SHUTDOWN, False),
        (WHY, False),
        (KILLED, True),
        ((SHUTDOWN, 1, 2), True),
        (b"normal", True),
        ("normal", True),  # encodes as a binary
        ((NORMAL,), True),
    ],
)
def test_abnormal_is_all_but_normal_and_shutdown(reason: Term, abnormal: bool) -> None:
    assert is_abnormal(reason) is abnormal
    assert is_reported(Restart.TRANSIENT, reason) is abnormal
    assert is_reported(Restart.PERMANENT, reason)


@pytest.mark.parametrize("reason", [NORMAL, SHUTDOWN, WHY, KILLED, BOOM])
def test_restart_types(reason: Term) -> None:
    assert after_exit(Restart.PERMANENT, reason) is Verdict.RESTART
    assert after_exit(Restart.TEMPORARY, reason) is Verdict.FORGET
    wanted = Verdict.RESTART if is_abnormal(reason) else Verdict.FORGET
    assert after_exit(Restart.TRANSIENT, reason) is wanted


@pytest.mark.parametrize(
    ("auto_shutdown", "restart", "reason", "left", "verdict"),
    [
        ("never", "temporary", BOOM, False, Verdict.FORGET),
        ("any_significant", "temporary", BOOM, True, Verdict.STOP_ALL),
        ("any_significant", "transient", BOOM, True, Verdict.RESTART),
        ("any_significant", "transient", NORMAL, True, Verdict.STOP_ALL),
        ("all_significant", "transient", NORMAL, True, Verdict.FORGET),
        ("all_significant", "transient", NORMAL, False, Verdict.STOP_ALL),
    ],
)
def test_significant_children(
    auto_shutdown: str, restart: str, reason: Term, left: bool, verdict: Verdict
) -> None:
    auto = AutoShutdown(auto_shutdown)
    kind = Restart(restart)
    got = after_exit(kind, reason, significant=True, auto_shutdown=auto, significant_left=left)
    assert got is verdict
    insignificant = after_exit(kind, reason, auto_shutdown=auto, significant_left=left)
    assert insignificant is (Verdict.RESTART if verdict is Verdict.RESTART else Verdict.FORGET)


@pytest.mark.parametrize(
    ("strategy", "group"),
    [
        (Strategy.ONE_FOR_ONE, "b"),
        (Strategy.REST_FOR_ONE, "bcd"),
        (Strategy.ONE_FOR_ALL, "abcd"),
        (Strategy.SIMPLE_ONE_FOR_ONE, "b"),
    ],
)
def test_restart_group_of_each_strategy(strategy: Strategy, group: str) -> None:
    assert restart_group(strategy, "abcd", "b") == tuple(group)


@pytest.mark.parametrize(
    ("restart", "shutdown", "reason", "fault"),
    [
        (Restart.PERMANENT, 5.0, SHUTDOWN, None),
        (Restart.PERMANENT, 5.0, NORMAL, NORMAL),
        (Restart.PERMANENT, 5.0, WHY, WHY),
        (Restart.TRANSIENT, 5.0, NORMAL, None),
        (Restart.TEMPORARY, "infinity", WHY, None),
        (Restart.TRANSIENT, 5.0, KILLED, KILLED),  # it had to be killed
        (Restart.PERMANENT, "brutal_kill", KILLED, None),
        (Restart.PERMANENT, "brutal_kill", SHUTDOWN, SHUTDOWN),
        (Restart.TRANSIENT, "brutal_kill", SHUTDOWN, None),
        (Restart.TRANSIENT, "brutal_kill", BOOM, BOOM),
    ],
)
def test_what_is_reported_of_a_child_that_was_told_to_end(
    restart: Restart, shutdown: Shutdown, reason: Term, fault: Term
) -> None:
    assert shutdown_fault(restart, shutdown, reason) == fault
