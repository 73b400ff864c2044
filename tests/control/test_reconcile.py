"""What runs, compared with what should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import etf
from bridge.term import Atom, Pid, Term
from control.books import Record
from control.desired import Desired, Wanted
from control.instance_spec import spec_term
from control.load_options import LoadOptions
from control.reconcile import Running, reconcile, running_of, taken_by
from tests.control.specs import spec

NODES = ("n@h1", "n@h2", "n@h3")
IDS = ("a", "b", "c", "x")


def group_at(node: str, serial: int = 1) -> Pid:
    return Pid(Atom(node), serial, 0, 1)


def runs(
    id_: str, node: str = NODES[0], *more: str, epoch: int = 1, idle: bool = False, serial: int = 1
) -> Running:
    return Running(node, spec(id_, node, *more), None if idle else group_at(node, serial), epoch)


def test_what_runs_is_kept_and_what_is_missing_is_started() -> None:
    desired = Desired().add(Wanted("a", "m")).add(Wanted("b", "m", LoadOptions(tensor=2)))
    verdict = reconcile([runs("a", epoch=3), runs("x")], desired, {})
    kept = sorted((r.id, r.on_demand, r.state, r.epoch, g.node) for r, g in verdict.kept)
    assert kept == [
        ("a", False, "recovering", 3, NODES[0]),
        ("x", True, "recovering", 1, NODES[0]),
    ]
    assert [(r.id, r.wanted.options.tensor) for r in verdict.missing] == [("b", 2)]
    assert not verdict.surplus
    assert not verdict.idle


def test_of_two_the_newer_goes_on() -> None:
    desired = Desired().add(Wanted("a", "m"))
    old, new = runs("a", NODES[0], epoch=2), runs("a", NODES[1], epoch=5)
    verdict = reconcile([old, new], desired, {})
    assert [(r.id, g) for r, g in verdict.kept] == [("a", new.group)]
    assert verdict.surplus == [old]


def test_what_was_unloaded_while_its_machine_was_away_ends() -> None:
    gone = runs("a")
    assert reconcile([gone], Desired().add(Wanted("a", "m")).remove("a"), {}).surplus == [gone]


def test_weights_of_a_former_life_are_used_where_nothing_better_runs() -> None:
    desired = Desired().add(Wanted("a", "m")).add(Wanted("b", "m"))
    idle = [runs("a", idle=True), runs("b", idle=True), runs("x", idle=True)]
    running = runs("a", NODES[1])
    verdict = reconcile([*idle, running], desired, {})
    assert [r.id for r, _ in verdict.kept] == ["a"]
    assert [(r.id, r.state) for r in verdict.idle] == [("b", "recovering")]
    assert not verdict.surplus
    assert not verdict.missing


def record(id_: str, state: str, node: str | None = NODES[0]) -> Record:
    made = Record(id_, "m", Wanted(id_, "m"), state=state)
    made.spec = spec(id_, node) if node else None
    return made


@pytest.mark.parametrize(
    ("known", "verdict"),
    [
        (record("a", "ready"), "kept"),
        (record("a", "loading"), "kept"),
        (record("a", "failed", NODES[1]), "kept"),  # for want of what has just come back
        (record("a", "ready", NODES[1]), "surplus"),
        (record("a", "recovering", None), "surplus"),  # it is being placed anew
        (record("a", "draining"), ""),
        (record("a", "draining", NODES[1]), ""),
    ],
)
def test_a_machine_that_comes_back_with_what_the_books_know(known: Record, verdict: str) -> None:
    before = (known.state, known.ever_ready)
    found = reconcile([runs("a")], Desired().add(Wanted("a", "m")), {"a": known})
    kept = [r for r, _ in found.kept]
    assert (kept, len(found.surplus)) == (
        [known] if verdict == "kept" else [],
        verdict == "surplus",
    )
    assert not found.missing
    assert known.ever_ready is False
    if verdict != "kept":
        assert (known.state, known.ever_ready) == before


RUNNING = st.builds(
    runs,
    st.sampled_from(IDS),
    st.sampled_from(NODES),
    epoch=st.integers(1, 5),
    idle=st.booleans(),
    serial=st.integers(1, 50),
)
DESIRED = st.builds(
    lambda wanted, gone: Desired(
        1, "", tuple(Wanted(i, "m") for i in wanted), tuple(set(gone) - set(wanted))
    ),
    st.sets(st.sampled_from(IDS[:3])),
    st.sets(st.sampled_from(IDS)),
)
STATES = st.sampled_from(["ready", "loading", "recovering", "failed", "draining", "pulling"])
KNOWN = st.dictionaries(
    st.sampled_from(IDS), st.tuples(STATES, st.sampled_from([*NODES, None])), max_size=4
)


@given(st.lists(RUNNING, max_size=8), DESIRED, KNOWN)
def test_every_wanted_instance_goes_on_exactly_once(
    running: list[Running], desired: Desired, known: dict[str, tuple[str, str | None]]
) -> None:
    records = {id_: record(id_, state, node) for id_, (state, node) in known.items()}
    verdict = reconcile(running, desired, records)
    kept = [r.id for r, _ in verdict.kept]
    idle, missing = [r.id for r in verdict.idle], [r.id for r in verdict.missing]
    once = [*kept, *idle, *missing]
    assert len(once) == len(set(once))
    for wanted in desired.wanted:
        assert wanted.id in once or wanted.id in records
    assert set(missing) | set(idle) <= {w.id for w in desired.wanted} - records.keys()
    # Each group goes on or ends; one whose end is under way is left alone.
    for one in running:
        draining = one.spec.id in records and records[one.spec.id].state == "draining"
        ends = one in verdict.surplus
        stays = any(g == one.group and r.spec == one.spec for r, g in verdict.kept)
        if one.group is not None and not draining:
            assert stays or ends
        if draining or one.group is None:
            assert not ends
    for r, _ in verdict.kept:
        assert r.id not in desired.gone or r.id in records
        assert r.on_demand == (r.id not in {w.id for w in desired.wanted}) or r.id in records


def test_what_agents_say_is_read() -> None:
    spec_, group, epoch = Atom("spec"), Atom("group"), Atom("epoch")
    rows: list[Term] = [
        {spec_: spec_term(spec("a", *NODES)), group: group_at(NODES[0]), epoch: 4},
        {spec_: spec_term(spec("b")), group: Atom("undefined"), epoch: 1},
    ]
    term = etf.decode(etf.encode((Atom("ok"), rows)))
    one, two = running_of(NODES[0], term)
    assert one == Running(NODES[0], spec("a", *NODES), group_at(NODES[0]), 4)
    assert (two.group, two.spec.id) == (None, "b")
    for nonsense in [(Atom("error"), 1, 2), (Atom("ok"), [5]), 7, (Atom("ok"), [{spec_: 1}])]:
        with pytest.raises(ValueError, match="n@h1"):
            running_of(NODES[0], nonsense)


def test_memory_is_counted_by_machine_and_pool() -> None:
    shared = spec("a", "n@h1", "n@h1", "n@h2", num_bytes=5)
    assert taken_by(shared) == {("n@h1", "memory"): 10, ("n@h2", "memory"): 5}
