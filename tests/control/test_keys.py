"""API keys: made at random, found by hash, kept without what opens anything; and their document."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import etf
from bridge.term import Atom
from control.desired import Desired, Wanted, body_term, desired_of, read_desired, write_disk
from control.desired_sync import Disk, Document
from control.keys import (
    MAX_KEYS,
    ApiKey,
    BadKey,
    NoSuchKey,
    TooManyKeys,
    find_key,
    key_of,
    key_term,
    make_key,
)

NOW_S = 1_800_000_000.0
records = st.builds(
    ApiKey,
    id=st.text("0123456789abcdef", min_size=12, max_size=12),
    hash=st.binary(min_size=32, max_size=32).map(bytes.hex),
    name=st.text(max_size=64).filter(str.isprintable),
    scopes=st.sampled_from([("infer",), ("admin",), ("infer", "admin")]),
    rate_per_minute=st.integers(0, 1000),
    created_s=st.integers(0, 2**31),
    expires_s=st.integers(0, 2**31),
)


def made(number: int) -> ApiKey:
    return ApiKey(id=f"{number:012x}", hash=f"{number:064x}")


def test_a_key_is_random_and_its_record_has_the_hash_of_it_alone() -> None:
    key, record = make_key(NOW_S, name="mine", rate_per_minute=60, expires_s=NOW_S + 5)
    other, _ = make_key(NOW_S)
    assert key != other
    prefix, id_, secret = key.split("-", 2)
    assert (prefix, id_, len(secret)) == ("phx", record.id, 43)  # 256 bits
    assert record.hash == hashlib.sha256(key.encode()).hexdigest()
    assert record.scopes == ("infer",)
    assert (record.created_s, record.expires_s) == (NOW_S, NOW_S + 5)
    everything = f"{record!r} {key_term(record)!r} {record.public(NOW_S)!r}"
    assert secret not in everything
    assert record.hash not in repr(record.public(NOW_S))


def test_only_the_very_key_is_found() -> None:
    key, record = make_key(NOW_S)
    keys = {record.id: record}
    assert find_key(keys, key.encode()) is record
    for given_ in (key[:-1], key + "a", key.swapcase(), f"phx-{'0' * 12}-{key[-43:]}", "", "phx--"):
        assert find_key(keys, given_.encode()) is None
    assert find_key({}, key.encode()) is None


@given(st.binary(max_size=80))
def test_nothing_else_is_a_key(data: bytes) -> None:
    _, record = make_key(NOW_S)
    assert find_key({record.id: record}, data) is None


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"scopes": ["root"]}, "root"),
        ({"scopes": []}, "scopes"),
        ({"name": "x" * 65}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"rate_per_minute": -1}, "rate_per_minute"),
        ({"expires_s": NOW_S}, "over"),
        ({"expires_s": 1e15}, "expires_s"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_name(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(BadKey, match=named):
        make_key(NOW_S, **asked)


def test_a_key_ends_when_it_says() -> None:
    _, record = make_key(NOW_S, expires_s=NOW_S + 10)
    assert not record.expired(NOW_S + 9)
    assert record.expired(NOW_S + 10)
    assert not make_key(NOW_S)[1].expired(NOW_S * 2)


@given(records)
def test_a_record_comes_back_from_the_wire_and_from_json(record: ApiKey) -> None:
    assert key_of(etf.decode(etf.encode(key_term(record)))) == record
    assert key_of(json.loads(json.dumps(key_term(record)))) == record


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5},
        {"hash": b"x"},
        {"scopes": b"admin"},
        {"scopes": [b"root"]},
        {"extra": 1},
        {"created_s": True},
    ],
)
def test_a_damaged_record_is_refused_and_not_quoted(change: dict[str, Any]) -> None:
    term = {**key_term(made(7)), **change}
    with pytest.raises(BadKey) as caught:
        key_of(term)
    assert made(7).hash not in str(caught.value)
    others: list[Any] = [None, [], {Atom("id"): b"0" * 12}]
    for other in others:
        with pytest.raises(BadKey):
            key_of(other)


# -- in the desired document ----------------------------------------------------------------


@given(st.lists(records, max_size=4, unique_by=lambda one: one.id), st.booleans())
def test_keys_are_a_part_of_the_document(keys: list[ApiKey], revoke: bool) -> None:
    desired = Desired().add(Wanted("a-1", "a"))
    for key in keys:
        desired = desired.add_key(key)
    if keys and revoke:
        desired = desired.revoke_key(keys[0].id)
    body = etf.decode(etf.encode(body_term(desired)))
    assert desired_of(Document((1, desired.version), body)) == desired


def test_documents_of_before_there_were_keys_are_read(tmp_path: Path) -> None:
    old = Document((3, 4), (b"a", [(b"a-1", b"a", b"{}")], [b"b-1"]))
    assert desired_of(old) == Desired(4, "a", (Wanted("a-1", "a"),), ("b-1",))
    assert body_term(desired_of(old)) == ("a", [("a-1", "a", "{}")], ["b-1"])
    path = tmp_path / "desired.json"
    path.write_text('{"version": 4, "default": "a", "wanted": [], "fence": 1, "epoch": 3}')
    assert read_desired(path) == Desired(4, "a")


def test_the_file_is_for_this_user_alone_and_has_no_key(tmp_path: Path) -> None:
    key, record = make_key(NOW_S)
    desired = Desired().add_key(record).add_key(made(1)).revoke_key(made(1).id)
    path = tmp_path / "desired.json"
    write_disk(path, Disk(1, Document((1, desired.version), body_term(desired))))
    assert read_desired(path) == desired
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in path.read_text()
    path.write_text(path.read_text().replace(record.hash, "short"))
    with pytest.raises(Exception, match=r"desired\.json"):  # never guessed at: it would be open
        read_desired(path)


def test_a_revoked_key_is_gone_and_never_comes_back() -> None:
    desired = Desired().add_key(made(1)).add_key(made(2))
    after = desired.revoke_key(made(1).id)
    assert (after.keys, after.revoked) == ((made(2),), (made(1).id,))
    with pytest.raises(NoSuchKey, match="key list"):
        after.revoke_key(made(1).id)
    with pytest.raises(BadKey, match="was a key"):
        after.add_key(made(1))
    # a machine that was away still had it, and its cluster becomes part of this one
    assert after.merged(desired) is after
    assert desired.merged(after).keys == (made(2),)
    assert set(Desired().add_key(made(3)).merged(after).keys) == {made(2), made(3)}
    assert Desired().merged(after).revoked == after.revoked


def test_a_start_without_models_keeps_the_keys() -> None:
    desired = Desired().add(Wanted("a-1", "a")).add_key(made(1)).add_key(made(2))
    bare = desired.revoke_key(made(2).id).without_models()
    assert (bare.wanted, bare.keys, bare.revoked) == ((), (made(1),), (made(2).id,))


def test_there_are_not_too_many() -> None:
    full = replace(Desired(), keys=tuple(map(made, range(MAX_KEYS))))
    with pytest.raises(TooManyKeys, match="revoke"):
        full.add_key(made(MAX_KEYS))
