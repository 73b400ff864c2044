"""The desired state: survives a restart, refuses what it cannot mean."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import etf
from bridge.term import Atom
from control.desired import (
    MOST_GONE,
    BadDesired,
    Desired,
    Wanted,
    body_term,
    desired_of,
    read_desired,
    read_disk,
    write_disk,
)
from control.desired_sync import Disk, Document
from control.load_options import BadOption, LoadOptions

IDS = st.sampled_from(["a-1", "a-2", "b-1", "c-1"])
OPTIONS = st.builds(
    LoadOptions,
    slots=st.integers(0, 64),
    tensor=st.sampled_from([0, 2]),
    shares=st.sampled_from([(), (2.0, 0.1)]),
    engine=st.sampled_from(["", "torch"]),
    goal=st.sampled_from(["", "latency"]),
    priority=st.integers(-100, 100),
)
WANTED = st.builds(Wanted, IDS, st.text(max_size=5), OPTIONS)
STATES = st.builds(
    Desired,
    st.integers(0, 99),
    st.text(max_size=5),
    st.lists(WANTED, max_size=4, unique_by=lambda w: w.id).map(tuple),
    st.lists(IDS, max_size=4, unique=True).map(tuple),
)


def disk_of(desired: Desired, epoch: int = 0, fence: int = 0) -> Disk:
    return Disk(fence, Document((epoch, desired.version), body_term(desired)))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "desired.json"
    options = LoadOptions(slots=2, engine="torch", tensor=2, shares=(2.0, 0.1), experts="across")
    desired = Desired().add(Wanted("a-1", "a", options)).with_default("a")
    write_disk(path, disk_of(desired, epoch=4, fence=5))
    assert read_desired(path) == desired
    assert read_disk(path) == disk_of(desired, epoch=4, fence=5)
    assert [p.name for p in tmp_path.iterdir()] == ["desired.json"]


def test_no_file_is_an_empty_state(tmp_path: Path) -> None:
    assert read_desired(tmp_path / "none") == Desired()


@given(st.binary(max_size=60))
def test_a_damaged_file_is_named_and_never_guessed_at(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "desired.json"
        path.write_bytes(data)
        with pytest.raises(BadDesired, match=r"desired\.json"):
            read_desired(path)


def test_adding_again_replaces_and_every_change_counts() -> None:
    one = Desired().add(Wanted("a-1", "a")).add(Wanted("a-1", "a", LoadOptions(slots=9)))
    assert one.version == 2
    assert [w.options.slots for w in one.wanted] == [9]
    assert one.remove("a-1").wanted == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({Atom("contxt"): 5}, "contxt"),
        ({Atom("slots"): -1}, "slots"),
        ({Atom("slots"): True}, "slots"),
        ({Atom("slots"): b"4"}, "slots"),
        ({Atom("engine"): 4}, "engine"),
        ({Atom("engine"): b"jax"}, "jax"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[Atom, object], named: str) -> None:
    with pytest.raises(BadOption, match=named):
        LoadOptions.from_term(options)


def test_text_may_be_a_binary_or_an_atom() -> None:
    assert LoadOptions.from_term({b"engine": Atom("torch"), Atom("context"): 64}) == LoadOptions(
        engine="torch", context=64
    )


def test_the_file_of_an_older_release_is_read(tmp_path: Path) -> None:
    path = tmp_path / "desired.json"
    path.write_text('{"version": 3, "default": "a", "wanted": []}')
    assert read_disk(path) == disk_of(Desired(3, "a"))


@settings(max_examples=40)
@given(STATES)
def test_a_document_travels_as_it_is(desired: Desired) -> None:
    term = etf.decode(etf.encode(body_term(desired)))
    assert desired_of(Document((7, desired.version), term)) == desired


TERMS = st.recursive(
    st.none() | st.integers() | st.binary(max_size=3) | st.sampled_from([b"[]", b"5", b"{"]),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@settings(max_examples=40)
@given(TERMS | st.tuples(TERMS, st.lists(TERMS), st.lists(TERMS)))
def test_a_document_of_others_is_read_or_refused(term: Any) -> None:
    with contextlib.suppress(ValueError, BadOption):
        desired_of(Document((1, 1), term))


@given(STATES, STATES)
def test_clusters_that_become_one_want_what_both_wanted(mine: Desired, theirs: Desired) -> None:
    both = mine.merged(theirs)
    assert set(mine.wanted) <= set(both.wanted)
    ids = [w.id for w in both.wanted]
    assert len(ids) == len(set(ids))
    asked = {w.id for w in theirs.wanted} - set(mine.gone)
    assert set(ids) == {w.id for w in mine.wanted} | asked
    assert both.default == mine.default or theirs.default
    assert both.merged(theirs) is both
    assert both is mine or both.version == mine.version + 1


def test_what_was_unloaded_last_is_remembered() -> None:
    desired = Desired()
    for n in range(MOST_GONE + 1):
        desired = desired.add(Wanted(f"a-{n}", "a")).remove(f"a-{n}")
    assert desired.gone == tuple(f"a-{n}" for n in range(1, MOST_GONE + 1))
    assert desired.add(Wanted("a-9", "a")).gone == tuple(i for i in desired.gone if i != "a-9")
