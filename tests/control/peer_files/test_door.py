"""The file door with real sockets: who gets in, what is handed out, and when it is shut."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.peer_files.door import MAX_REQUEST_BYTES, REQUEST, Door, DoorLimits
from control.peer_files.line import Line, LineLost
from tests.waiting import wait_until

HASTY = DoorLimits(max_connections=2, token_s=5, greet_s=0.3, idle_s=0.5, linger_s=0.1)


class OneFile:
    """File 0, of which nothing else is handed out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def open(self, file: int, start: int, length: int) -> Iterator[int]:
        if file != 0:
            raise ValueError(f"no file {file}")
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@pytest.fixture
def served(tmp_path: Path) -> OneFile:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 8192)
    return OneFile(path)


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door(lambda: ["127.0.0.1"], HASTY)
    yield made
    made.close()
    wait_until(lambda: not made.is_open, 5)


def read(line: Line, size: int) -> bytes:
    line.ready()
    data = bytearray(size)
    line.read(memoryview(data))
    return bytes(data)


def get(line: Line, file: int, start: int, length: int) -> bytes:
    line.ask(file, start, length)
    return read(line, max(1, length % 100))


@pytest.mark.slow
def test_a_token_opens_it_once_and_it_shuts_by_itself(door: Door, served: OneFile) -> None:
    assert not door.is_open
    doors, (token,) = door.admit(served, 1)
    assert door.is_open
    with Line(doors, token) as line:
        line.ask(0, 10, 300)
        line.ask(0, 1 << 20, 1 << 20)  # ahead of the first answer
        whole = served.path.read_bytes()
        assert read(line, 300) == whole[10:310]
        assert read(line, 1 << 20) == whole[1 << 20 :]
        with Line(doors, token) as again, pytest.raises(LineLost):
            get(again, 0, 0, 1)
    wait_until(lambda: not door.is_open, 5)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(doors[0], timeout=1)
    doors, (token,) = door.admit(served, 1)  # and it opens again
    with Line(doors, token) as line:
        line.ask(0, 0, 1)
        assert read(line, 1) == b"\0"


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    [(1, 0, 1), (0, 0, MAX_REQUEST_BYTES + 1), (0, 0, 0), (0, 1 << 62, 5), (0, (2 << 20) - 1, 9)],
)
def test_what_is_not_served_ends_the_connection(
    door: Door, served: OneFile, request_: tuple[int, int, int]
) -> None:
    doors, (token,) = door.admit(served, 1)
    with Line(doors, token) as line, pytest.raises(LineLost):
        get(line, *request_)


@pytest.mark.slow
def test_strangers_and_the_silent_are_let_go(door: Door, served: OneFile) -> None:
    doors, (token,) = door.admit(served, 1)
    with Line(doors, b"x" * 32) as line, pytest.raises(LineLost):
        get(line, 0, 0, 1)
    with socket.create_connection(doors[0], timeout=5) as silent:
        assert silent.recv(1) == b""  # after greet_s
    with Line(doors, token) as line:
        line.ask(0, 0, 1)
        assert read(line, 1) == b"\0"
        with pytest.raises(LineLost):  # after idle_s
            line.ready()


@pytest.mark.slow
def test_no_more_connections_than_the_limit(door: Door, served: OneFile) -> None:
    doors, tokens = door.admit(served, 3)
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Line(doors, token)) for token in tokens[:2]]
        for line in lines:
            line.ask(0, 0, 1)
            assert read(line, 1) == b"\0"
        with Line(doors, tokens[2]) as third, pytest.raises(LineLost):
            get(third, 0, 0, 1)


def test_no_address_to_serve_at() -> None:
    with pytest.raises(OSError, match="no address"):
        Door(list).admit(OneFile(Path("f")), 1)


def test_a_request_is_sixteen_bytes() -> None:
    assert REQUEST.size == 16
