"""The home folder: secrets made once and private, stale run files, one node a home."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ops.errors import HomeBusy, HomeError
from ops.home import Home, RunInfo, create_secret_file, default_root, find_home, open_home

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")


def test_the_cookie_is_made_once_and_is_private(tmp_path: Path) -> None:
    home = open_home(tmp_path / "a" / "b")
    cookie = home.cookie()
    assert len(cookie) == 32
    assert cookie.isalnum()
    assert home.cookie() == open_home(home.root).cookie() == cookie
    if sys.platform != "win32":
        assert stat.S_IMODE(home.cookie_file.stat().st_mode) == 0o600
        assert stat.S_IMODE(home.root.stat().st_mode) == 0o700


def test_starters_at_the_same_time_read_the_same_cookie(tmp_path: Path) -> None:
    for attempt in range(20):
        home = open_home(tmp_path / str(attempt))
        with ThreadPoolExecutor(8) as pool:
            cookies = set(pool.map(lambda home: home.cookie(), [home] * 8))
        assert len(cookies) == 1
        assert [p.name for p in home.root.iterdir() if "cookie" in p.name] == ["cookie"]


def test_a_secret_file_never_replaces_another(tmp_path: Path) -> None:
    create_secret_file(tmp_path / "k", "first")
    create_secret_file(tmp_path / "k", "second")
    assert (tmp_path / "k").read_text() == "first"


@posix
def test_a_cookie_that_others_can_read_is_refused(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    home.cookie()
    home.cookie_file.chmod(0o644)
    with pytest.raises(HomeError, match=r"mode 0644 lets other users read.*chmod 600"):
        home.cookie()


@pytest.mark.parametrize("text", [b"", b"  \n", b"x" * 256, b"\xff\xfe"])
def test_a_cookie_file_without_a_cookie_is_refused(text: bytes, tmp_path: Path) -> None:
    home = open_home(tmp_path)
    home.cookie_file.write_bytes(text)
    home.cookie_file.chmod(0o600)
    with pytest.raises(HomeError, match="Delete it to get a new one"):
        home.cookie()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_cookie_that_cannot_be_made_asks_for_space_not_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = open_home(tmp_path)

    def write_where_nothing_fits(path: Path, text: str) -> None:
        with Path("/dev/full").open("w") as full:
            full.write(text)

    monkeypatch.setattr("ops.home.create_secret_file", write_where_nothing_fits)
    with pytest.raises(HomeError, match=r"No space left on device\. Free some space") as caught:
        home.cookie()
    assert "Delete" not in str(caught.value)
    assert not home.cookie_file.exists()


def test_a_home_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/phalanx")):
        with pytest.raises(
            HomeError, match=r"choose a folder with --home or PHALANX_HOME"
        ) as caught:
            open_home(root)
        assert str(root) in str(caught.value)


def test_the_default_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHALANX_HOME", raising=False)
    assert default_root() == Path.home() / ".phalanx"
    monkeypatch.setenv("PHALANX_HOME", "~/elsewhere")
    assert default_root() == Path.home() / "elsewhere"
    assert find_home(Path("x")).root == Path.cwd() / "x"


def test_the_run_file_of_a_dead_process_is_stale(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    assert home.read_run() is None
    mine = RunInfo(node="a@b", url="http://x", dist_port=1, epmd_port=2)
    home.write_run(mine)
    assert home.read_run() == mine
    for stale in (
        RunInfo(node="a@b", url="", dist_port=1, epmd_port=2, started_s=mine.started_s - 100),
        RunInfo(node="a@b", url="", dist_port=1, epmd_port=2, os_pid=_dead_pid()),
    ):
        home.write_run(stale)
        assert home.read_run() is None
    home.run_file.write_text('{"node": "a@')
    assert home.read_run() is None
    home.remove_run()
    home.remove_run()
    assert home.read_run() is None


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def _hold(root: Path, held: object, release: object) -> None:
    with Home(root).hold():
        held.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]
        os._exit(1)  # dies without letting go


@pytest.mark.slow
def test_one_node_a_home_until_it_dies(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(home.root, held, release))
    other.start()
    try:
        assert held.wait(30)
        with (
            pytest.raises(HomeBusy, match=r"another node runs on it.*ctl stop --home"),
            home.hold(),
        ):
            pass
        release.set()
    finally:
        release.set()
        other.join(30)
    with home.hold():
        pass
