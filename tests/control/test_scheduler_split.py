"""Schedulers whose leader or machines are out of reach for a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.term import Atom
from tests.control.in_loop import in_loop
from tests.control.lab import lab, until
from tests.control.test_scheduler_cluster import N1, N2, N3, ROOM, THREE, where

A = Atom
NO_ROOM = 10**6


@in_loop
async def test_what_had_no_other_place_is_ready_again_with_its_machine(tmp_path: Path) -> None:
    limits = {N1: NO_ROOM, N2: NO_ROOM, N3: ROOM}
    async with lab(tmp_path, limits, leader=N1) as made:
        assert await made[N1].ask("load", "tiny", {}) == (A("ok"), "tiny-1")
        await until(lambda: where(made)[N3])
        made.lead("", 1, only=N3)
        made.cut_off(N3)
        await until(lambda: made[N1].known_states() == [("tiny-1", "failed")])
        made.lead(N1, 1, only=N3)
        await made.come_back(N3)
        await until(lambda: made[N1].known_states() == [("tiny-1", "ready")])
        assert [spec.id for spec in made[N3].agent.started] == ["tiny-1"]


@in_loop
async def test_epochs_go_on_under_the_next_leader(tmp_path: Path) -> None:
    async with lab(tmp_path, THREE, leader=N1) as made:
        await made[N1].ask("load", "tiny", {A("replicas"): 3})
        await until(lambda: all(where(made).values()))
        (lost,) = where(made)[N1]
        for other in (N2, N3):
            assert (await made[other].ask("find", lost))[0] == "ok"
        made.lead("", 1, only=N1)
        made.cut_off(N1)
        made.lead(N2, 2, only=N2)
        made.lead(N2, 2, only=N3)
        await made[N2].leads()
        made[N2].tell((A("settled"), 2))
        await until(lambda: lost in where(made)[N2] + where(made)[N3])
        started = made[N2].agent.started + made[N3].agent.started
        assert [spec.first_epoch for spec in started if spec.id == lost] == [1]


@pytest.mark.slow
@in_loop
async def test_who_looks_at_what_runs_does_not_wait_for_a_silent_leader(tmp_path: Path) -> None:
    async with lab(tmp_path, THREE, leader=N1) as made:
        await made[N1].ask("load", "tiny", {})
        assert (await made[N2].ask("find", "tiny"))[0] == "ok"
        with made[N1].node.open_process(label="test") as me:
            me.send(A("scheduler"), (A("system"), (me.pid, me.make_ref()), A("suspend")))
            await me.receive(timeout_s=5)
        assert await made[N2].states() == {"tiny-1": "ready"}
