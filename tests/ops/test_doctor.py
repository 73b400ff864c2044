"""`ctl doctor`: what it says of addresses, ports, other machines; and its exit status."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from control.discovery.addresses import Interface
from ops.doctor import address, members, multicast_works, others
from ops.home import open_home
from tests.ops.ctl_harness import run_ctl

LINKS = [
    Interface(name="lo", address="127.0.0.1", prefix_bits=8),
    Interface(name="eth0", address="10.0.0.1", prefix_bits=24),
]


@pytest.mark.parametrize(
    ("host", "state", "text"),
    [
        ("127.0.0.1", "note", "this machine alone"),
        ("10.0.0.1", "good", "listens on 10.0.0.1"),
        ("10.0.0.9", "bad", "is no address of this machine; its links that are up have: 10.0.0.1"),
        ("no.such.name.invalid", "bad", "is not known here"),
    ],
)
def test_an_address_that_others_cannot_reach_is_named(host: str, state: str, text: str) -> None:
    found = address(host, LINKS)
    assert found.state == state
    assert text in found.text


def test_nodes_that_are_seen_and_not_joined_are_named_with_the_reason() -> None:
    rows: list[dict[str, Any]] = [
        {"node": "a@x", "state": "joined", "why": ""},
        {"node": "b@x", "state": "refused", "why": "it has another secret", "addresses": ["x:1"]},
        {"node": "c@x", "state": "refused", "why": "it is of the cluster 'home'", "addresses": []},
        {"node": "d@x", "state": "trying", "why": "no link at x:2", "addresses": ["x:2"]},
        {"node": "e@x", "state": "seen", "why": "", "addresses": ["x:3"]},
    ]
    found = others(rows)
    assert [one.state for one in found] == ["bad", "note", "bad", "good"]
    assert found[0].text == "b@x (x:1) is not joined: it has another secret"
    assert "d@x is seen and cannot be reached: no link at x:2" in found[2].text


def test_lost_machines_other_versions_and_clocks_are_named() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a@x", "state": "up"},
        {"name": "b@x", "state": "down", "why": "silent for 3.0 s"},
        {"name": "c@x", "state": "up", "note": "it runs version 2", "clock_ahead_s": -61.2},
    ]
    found = {(one.what, one.state): one.text for one in members(rows)}
    assert found["cluster", "good"] == "2 up: a@x, c@x"
    assert found["cluster", "bad"] == "b@x is down: silent for 3.0 s"
    assert found["version", "note"] == "c@x: it runs version 2"
    assert found["clock", "bad"] == "that of c@x is 61 s behind: set both by NTP"


def test_multicast_from_an_address_that_is_not_ours_does_not_work() -> None:
    assert not multicast_works("192.0.2.1")


def test_the_command_says_what_to_do_and_its_status_tells(tmp_path: Path) -> None:
    home = tmp_path / "home"
    open_home(home)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (home / "config.yaml").write_text(f"http: {{port: {port}}}\n")
        found = run_ctl("doctor", "--home", home, "--json")
        assert found.status == 1
        rows = json.loads(found.out)
        (bad,) = [row for row in rows if row["state"] == "bad"]
        assert (bad["what"], f"127.0.0.1:{port} is taken" in bad["text"]) == ("ports", True)
    found = run_ctl("doctor", "--home", home)
    assert found.status == 0
    assert f"127.0.0.1:{port} is free" in found.out
    assert not (home / "cookie").exists()
