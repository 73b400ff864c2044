"""Schedulers of several machines among stand-ins: who places where, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

from bridge.term import Atom
from control.desired import read_desired
from tests.control.in_loop import in_loop
from tests.control.lab import Lab, lab, until

A = Atom
N1, N2, N3 = "n1@127.0.0.1", "n2@127.0.0.1", "n3@127.0.0.1"
ROOM = 4 * 10**9
THREE = {N1: ROOM, N2: ROOM, N3: ROOM}


def where(made: Lab) -> dict[str, list[str]]:
    """Instances that run, by machine."""
    return {name: sorted(one.agent.groups) for name, one in made.machines.items()}


def places(made: Lab) -> dict[str, list[str]]:
    """Machines by instance."""
    found: dict[str, list[str]] = {}
    for name, ids in where(made).items():
        for id_ in ids:
            found.setdefault(id_, []).append(name)
    return found


@in_loop
async def test_replicas_are_on_different_machines(tmp_path: Path) -> None:
    async with lab(tmp_path, THREE, leader=N1) as made:
        assert (await made[N1].ask("load", "tiny", {A("replicas"): 3}))[0] == "ok"
        await until(lambda: len(places(made)) == 3)
        assert sorted(map(tuple, places(made).values())) == [(N1,), (N2,), (N3,)]
        assert {w.id for w in read_desired(made[N3].desired_path).wanted} == set(places(made))
        assert (await made[N1].ask("load", "tiny", {}))[0] == "ok"  # a fourth has to share
