"""The desired state: survives a restart, refuses what it cannot mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.term import Atom
from control.desired import (
    BadDesired,
    Desired,
    DesiredFile,
    Wanted,
    read_desired,
    write_desired,
)
from control.load_options import BadOption, LoadOptions


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "desired.json"
    options = LoadOptions(slots=2, engine="torch", tensor=2, shares=(2.0, 0.1), experts="across")
    desired = Desired().add(Wanted("a-1", "a", options)).with_default("a")
    write_desired(path, desired)
    assert read_desired(path) == desired
    assert [p.name for p in tmp_path.iterdir()] == ["desired.json"]


def test_no_file_is_an_empty_state(tmp_path: Path) -> None:
    assert read_desired(tmp_path / "none") == Desired()


@given(st.binary(max_size=60))
def test_a_damaged_file_is_named_and_never_guessed_at(data: bytes) -> None:
    import tempfile

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


def test_a_full_disk_costs_the_file_and_not_the_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = DesiredFile(tmp_path / "gone" / "desired.json")
    file.read()
    file.save(file.now.add(Wanted("a-1", "a")))
    assert [wanted.id for wanted in file.now.wanted] == ["a-1"]
    assert "lost at a restart" in caplog.text
