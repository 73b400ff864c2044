"""``ctl key``: a key is shown once, alone; the node gets its hash. And what a start makes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.desired import Desired, body_term, write_disk
from control.desired_sync import Disk, Document
from control.keys import make_key
from ops.commands.keys import expires_at
from ops.commands.start import decide
from ops.config import Config, loads
from ops.errors import BadUsage, ConfigError
from ops.home import Home
from ops.start_settings import StartSettings
from tests.ops.ctl_harness import CtlNode, run_ctl, running_node

NOW_S = 1_800_000_000.0  # 2027-01-15 08:00 UTC


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlNode]:
    with running_node(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest.mark.slow
def test_a_key_is_printed_alone_and_the_node_never_sees_it(node: CtlNode) -> None:
    made = node.ctl("key", "create", "--name", "me", "--scope", "admin", "--scope", "infer")
    key = made.out.strip()
    id_ = key.split("-")[1]
    assert (made.status, len(key)) == (0, 60)
    assert id_ in made.err
    assert key not in made.err
    hash_ = hashlib.sha256(key.encode()).hexdigest()
    assert f"add_key me ('infer', 'admin') 0 {hash_}" in node.seen
    assert key not in "".join(node.seen)
    listed = node.ctl("key", "list")
    for word in (id_, "me", "infer, admin", "any", "never"):
        assert word in listed.out
    assert key not in listed.out
    assert node.ctl("key", "revoke", id_).status == 0
    again = node.ctl("key", "revoke", id_)
    assert (again.status, again.out) == (1, "")
    assert id_ in again.err


@pytest.mark.slow
def test_keys_as_json(node: CtlNode) -> None:
    made = node.ctl("key", "create", "--rate-per-minute", "60", "--expires", "30d", "--json").json
    assert made["key"].startswith(f"phx-{made['id']}-")
    assert made["expires_s"] - made["created_s"] == 30 * 86400
    (row,) = [one for one in node.ctl("key", "list", "--json").json if one["id"] == made["id"]]
    assert (row["rate_per_minute"], row["scopes"]) == (60, ["infer"])
    assert "key" not in row
    assert node.ctl("key", "revoke", made["id"], "--json").json["revoked"] == made["id"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("--scope root", "root"),
        ("--expires soon", "--expires"),
        ("--expires 2001-01-01", "over"),
        ("--rate-per-minute 0", "rate-per-minute"),
        (f"--name {'x' * 65}", "name"),
    ],
)
def test_bad_usage_is_status_2_and_asks_no_node(args: str, named: str, tmp_path: Path) -> None:
    found = run_ctl("key", "create", *args.split(), "--home", tmp_path)
    assert (found.status, found.out) == (2, "")
    assert named in found.err


@pytest.mark.parametrize(
    ("text", "after_s"),
    [
        ("90m", 5400), ("12h", 43200), ("1w", 604800), ("2027-01-16", 57600),
        ("2027-01-15T09:00", 3600), ("2027-01-15T10:00+01:00", 3600),
    ],
)  # fmt: skip
def test_when_a_key_ends(text: str, after_s: int) -> None:
    assert expires_at(text, NOW_S) == NOW_S + after_s


# -- what a start makes of keys --------------------------------------------------------------


def start(home: Path, http: str, *, insecure: bool = False) -> StartSettings:
    return decide(
        Home(home),
        None,
        Config(),
        name=None,
        http=http,
        models=(),
        no_model=True,
        log_json=False,
        insecure=insecure,
    )


def test_a_key_lets_the_endpoint_be_reached_from_other_machines(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(BadUsage, match="ctl key create"):
        start(tmp_path, "0.0.0.0:80")
    assert start(tmp_path, "0.0.0.0:80", insecure=True).insecure
    desired = Desired().add_key(make_key(NOW_S)[1])
    keep(tmp_path, desired)
    found = start(tmp_path, "0.0.0.0:80")
    assert (found.http_host, found.insecure) == ("0.0.0.0", False)
    keep(tmp_path, desired.revoke_key(desired.keys[0].id))
    with pytest.raises(BadUsage, match="--insecure"):
        start(tmp_path, "0.0.0.0:80")


def keep(home: Path, desired: Desired) -> None:
    document = Document((1, desired.version), body_term(desired))
    write_disk(home / "state" / "desired.json", Disk(1, document))


def test_the_settings_of_http(tmp_path: Path) -> None:
    text = (
        "http:\n  tls: {certificate: a.pem, key: /k.pem}\n  cors_origins: ['https://a.example']\n"
    )
    http = loads(text, "c.yaml", tmp_path).http
    assert http.tls is not None
    assert (http.tls.certificate, http.tls.key) == (tmp_path / "a.pem", Path("/k.pem"))
    assert http.cors_origins == ("https://a.example",)
    made = loads("http: {tls: true, cors_origins: ['*', 'http://[::1]:80']}", "c.yaml", tmp_path)
    assert made.http.tls is not None
    assert made.http.tls.certificate is None
    for bad, problem in (
        ("http: {tls: {key: k}}", "http.tls.key: certificate and key belong together"),
        ("http: {tls: {ca: k}}", "http.tls.ca: unknown field; known: certificate, key"),
        ("http: {cors_origins: ['https://a/b']}", "http.cors_origins"),
        ("http: {cors_origins: ['a.example']}", "http.cors_origins"),
    ):
        with pytest.raises(ConfigError) as caught:
            loads(bad, "c.yaml", tmp_path)
        assert problem in str(caught.value)
