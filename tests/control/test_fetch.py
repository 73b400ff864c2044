"""Downloads against a real server that breaks off, lies and refuses; real full disks."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.errors import ChecksumMismatch, DiskFull, DownloadFailed, StoreUnusable
from control.fetch import Cancelled, HttpSettings, fetch, shown_url
from tests.control.file_server import FileServer, closed_port

DATA = os.urandom(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()
HASTY = HttpSettings(retry_delay_s=0.01, max_delay_s=0.02, read_timeout_s=5, max_attempts=3)


class Caller:
    """One caller of fetch: where it wants the file, and what it was told."""

    def __init__(self, folder: Path) -> None:
        self.target = folder / "model.gguf"
        self.cancelled = threading.Event()
        self.seen: list[tuple[int, int]] = []

    def fetch(self, url: str, sha256: str | None = SHA, size_bytes: int | None = None) -> None:
        fetch(
            url,
            self.target,
            sha256=sha256,
            size_bytes=size_bytes,
            on_bytes=lambda done, total: self.seen.append((done, total)),
            cancelled=self.cancelled,
            settings=HASTY,
        )

    def left(self) -> list[str]:
        return sorted(path.name for path in self.target.parent.iterdir())


@pytest.fixture
def caller(tmp_path: Path) -> Caller:
    return Caller(tmp_path)


def test_a_file_arrives_whole_and_progress_is_told(caller: Caller, server: FileServer) -> None:
    caller.fetch(server.add("/m", DATA))
    assert caller.target.read_bytes() == DATA
    assert caller.left() == ["model.gguf"]
    assert caller.seen[-1] == (len(DATA), len(DATA))
    assert [done for done, _ in caller.seen] == sorted({done for done, _ in caller.seen})
    caller.fetch(server.url + "/gone")  # it is there: nobody is asked
    assert len(server.requests) == 1


def test_a_dropped_connection_is_resumed_where_it_broke(caller: Caller, server: FileServer) -> None:
    caller.fetch(server.add("/m", DATA, drops=[1_000_000, 500_000]))
    assert caller.target.read_bytes() == DATA
    starts = [wanted for _, _, wanted in server.requests]
    assert starts[0] == ""
    assert all(wanted.startswith("bytes=") for wanted in starts[1:])
    assert len(starts) == 3


def test_a_server_without_ranges_is_asked_from_the_start(
    caller: Caller, server: FileServer
) -> None:
    caller.fetch(server.add("/m", DATA, drops=[1_000_000], ranges=False))
    assert caller.target.read_bytes() == DATA


def test_without_etag_and_digest_parts_are_not_glued(caller: Caller, server: FileServer) -> None:
    caller.fetch(server.add("/m", DATA, drops=[1_000_000], etag=False), sha256=None)
    assert caller.target.read_bytes() == DATA
    assert [wanted for _, _, wanted in server.requests] == ["", ""]


def test_a_file_that_changed_between_two_tries_is_fetched_anew(
    caller: Caller, server: FileServer
) -> None:
    url = server.add("/m", b"old" * 1_000_000, drops=[1_000_000] + [0] * 9)
    with pytest.raises(DownloadFailed):
        caller.fetch(url)
    assert caller.left() == ["model.gguf.part", "model.gguf.part.json"]
    server.add("/m", DATA)
    caller.fetch(url)
    assert caller.target.read_bytes() == DATA


def test_a_wrong_part_on_disk_is_not_the_end(caller: Caller, server: FileServer) -> None:
    (caller.target.parent / "model.gguf.part").write_bytes(b"x" * 2_000_000)
    caller.fetch(server.add("/m", DATA, etag=False))
    assert caller.target.read_bytes() == DATA
    caller.target.unlink()
    (caller.target.parent / "model.gguf.part").write_bytes(b"x" * 4_000_000)  # longer than the file
    caller.fetch(server.url + "/m")
    assert caller.target.read_bytes() == DATA


def test_a_part_that_is_complete_needs_no_more_bytes(caller: Caller, server: FileServer) -> None:
    (caller.target.parent / "model.gguf.part").write_bytes(DATA)
    caller.fetch(server.add("/m", DATA))
    assert caller.target.read_bytes() == DATA


@pytest.mark.parametrize("status", [404, 403, 401, 410])
def test_a_refusal_is_told_at_once(status: int, caller: Caller, server: FileServer) -> None:
    url = server.add("/m", DATA, statuses=[status] * 9)
    with pytest.raises(DownloadFailed, match=f"the server answered {status}"):
        caller.fetch(url)
    assert len(server.requests) == 1
    assert caller.left() == []


def test_a_busy_server_is_asked_again(caller: Caller, server: FileServer) -> None:
    caller.fetch(server.add("/m", DATA, statuses=[503, 429]))
    assert caller.target.read_bytes() == DATA
    server.add("/n", DATA, statuses=[500] * 9)
    caller.target.unlink()
    with pytest.raises(DownloadFailed, match="the server answered 500"):
        caller.fetch(server.url + "/n")


def test_a_server_that_always_breaks_off_is_given_up_and_the_part_kept(
    caller: Caller, server: FileServer
) -> None:
    url = server.add("/m", DATA, drops=[700_000] + [0] * 9)
    with pytest.raises(DownloadFailed, match=r"without sending complete message body"):
        caller.fetch(url)
    server.files["/m"].drops.clear()
    caller.fetch(url)
    assert caller.target.read_bytes() == DATA
    assert server.requests[-1][2].startswith("bytes=")


def test_a_wrong_digest_leaves_nothing(caller: Caller, server: FileServer) -> None:
    with pytest.raises(ChecksumMismatch, match=r"expected sha256 0{64}, got [0-9a-f]{64}"):
        caller.fetch(server.add("/m", DATA), sha256="0" * 64)
    assert caller.left() == []


def test_a_file_of_another_size_leaves_nothing(caller: Caller, server: FileServer) -> None:
    with pytest.raises(ChecksumMismatch, match=r"expected 5 bytes, got 3000000 bytes"):
        caller.fetch(server.add("/m", DATA), size_bytes=5)
    assert caller.left() == []


def test_nobody_at_the_port_is_a_clear_error(caller: Caller) -> None:
    with closed_port() as url, pytest.raises(DownloadFailed, match=r"Connection refused.*network"):
        caller.fetch(url("/m"))
    with pytest.raises(DownloadFailed):
        caller.fetch("http://[bad/m")


def test_a_cancelled_download_stops_and_keeps_its_part(caller: Caller, server: FileServer) -> None:
    gate = threading.Event()
    url = server.add("/m", DATA, gate=gate)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            caller.fetch(url)
        except Cancelled as exc:
            failed.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    assert server.reached_gate.wait(10)
    caller.cancelled.set()
    gate.set()
    thread.join(10)
    assert [type(exc) for exc in failed] == [Cancelled]
    assert not caller.target.exists()


def test_files_are_copied_too(caller: Caller, tmp_path: Path) -> None:
    source = tmp_path / "with space.bin"
    source.write_bytes(DATA)
    caller.fetch(source.as_uri())
    assert caller.target.read_bytes() == DATA
    caller.target.unlink()
    with pytest.raises(DownloadFailed, match="No such file"):
        caller.fetch((tmp_path / "none").as_uri())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system mounts no tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_told_before_the_first_byte(tiny_disk: Path, server: FileServer) -> None:
    caller = Caller(tiny_disk)
    with pytest.raises(DiskFull, match=r"3\.0 MB more are needed, 1\.0 MB are free"):
        caller.fetch(server.add("/m", DATA))
    assert caller.left() == []


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(
    tiny_disk: Path, server: FileServer
) -> None:
    caller = Caller(tiny_disk)
    url = server.add("/m", DATA[:900_000], gate=threading.Event())
    thread = threading.Thread(
        target=lambda: (
            server.reached_gate.wait(10),
            (tiny_disk / "other").write_bytes(b"x" * 500_000),
            server.files["/m"].gate.set(),  # type: ignore[union-attr]
        )
    )
    thread.start()
    with pytest.raises(DiskFull):
        caller.fetch(url, sha256=None)
    thread.join(10)
    assert caller.left() == ["other"]


def test_a_folder_that_cannot_be_made_is_named(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    caller = Caller(tmp_path / "file" / "below")
    with pytest.raises(StoreUnusable, match=r"below: Not a directory"):
        caller.fetch(server.add("/m", DATA))


def test_secrets_of_a_url_are_not_shown() -> None:
    assert shown_url("https://me:pw@host:8/a/b?token=x#y") == "https://host:8/a/b"
