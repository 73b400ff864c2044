"""Where files are, who fetches them, and which parts a machine needs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.term import Atom
from control import model_files
from control.model_files import Located, NoFiles, best_fetcher, best_sources
from models.needed import merged
from tests.control.in_loop import in_loop
from tests.control.lab import lab

A, B, C = "a@h", "b@h", "c@h"
KEEPS, COMPUTES = frozenset({"storage", "compute"}), frozenset({"compute"})


def test_this_machine_then_keepers_then_the_rest_are_asked() -> None:
    located = {n: Located(n, Path("x"), n != "d@h") for n in (A, B, C, "d@h")}
    roles = {A: COMPUTES, B: COMPUTES, C: KEEPS}
    assert best_sources(located, roles, B) == [B, C, A]
    assert best_sources(located, roles, "e@h") == [C, A, B]
    assert best_sources({}, roles, A) == []


def test_a_keeper_fetches_from_outside() -> None:
    assert best_fetcher({A: KEEPS, B: KEEPS}, B) == B
    assert best_fetcher({A: COMPUTES, C: KEEPS, B: KEEPS}, A) == B
    assert best_fetcher({A: COMPUTES}, A) == A
    assert best_fetcher({}, A) == A


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=12))
def test_ranges_of_several_ranks_are_asked_for_once(parts: list[tuple[int, int]]) -> None:
    ranges = [(begin, begin + size) for begin, size in parts]
    found = merged(ranges)
    assert {n for r in found for n in range(*r)} == {n for r in ranges for n in range(*r)}
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


@in_loop
async def test_who_does_not_answer_has_nothing(tmp_path: Path) -> None:
    machines = {"n1@127.0.0.1": 10**9, "n2@127.0.0.1": 10**9}
    async with lab(tmp_path, machines) as made:
        one = made["n1@127.0.0.1"].node
        names = [*machines, "away@127.0.0.1"]
        found = await model_files.locate(one, "tiny", names)
        assert [(name, found[name].whole) for name in names] == list(
            zip(names, (True, True, False), strict=True)
        )
        assert found[names[1]].path == made.model
        with pytest.raises(NoFiles, match="no such host") as info:
            await model_files.fetch(one, names[1], "broken")
        assert info.value.kind == "download_failed"
        with pytest.raises(NoFiles, match="was lost") as info:
            await model_files.bring(one, names[2], "tiny", [names[0]], Atom("whole"))
        assert info.value.kind == "model_store_lost"
        assert (
            await model_files.bring(one, names[1], "far", names[:1], Atom("header")) == made.model
        )
        assert made[names[1]].store.asked[-1] == (
            "ensure",
            b"far",
            {"from": [names[0]], "part": "header"},
        )
