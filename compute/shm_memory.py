"""Memory that the ranks of one host map: made by the first of them, handed to the others.

On Unix it never has a name in any folder: the first rank listens on a local socket whose name
carries the group's key and the epoch, and sends the descriptor to the others. So whatever kills
whom, the kernel frees everything with the last process. On Windows it is a named mapping, which
goes with its last user likewise.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import select
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compute.errors import JoinRefused, PeerLost

_VERSION = 1
_LINE_BYTES = 4096
_RETRY_S = (0.001, 0.002, 0.005, 0.01, 0.02)


class Memory:
    """A mapping and its address."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        self.address: int = self._bytes.ctypes.data

    def words(self) -> npt.NDArray[np.int64]:
        """The memory as 64-bit words; must be dropped before :meth:`close`."""
        return self._bytes.view(np.int64)

    def close(self) -> None:
        """Unmap; nobody may use the address afterwards. A second call does nothing."""
        self.address = 0
        self._bytes = np.empty(0, dtype=np.uint8)
        self._mapping.close()


def share(
    *, group: str, epoch: int, ranks: Sequence[int], rank: int, size: int, timeout_s: float
) -> Memory:
    """Map the group's zeroed memory.

    Args:
        group: names the group and is no secret.
        ranks: of the group on this host, in order; the first one makes the memory.
        size: in bytes.

    Raises:
        PeerLost: somebody did not come, or ended meanwhile.
        JoinRefused: the others mean another group, or there is no memory left.
    """
    name = _name(group, epoch, ranks)
    if sys.platform == "win32":
        return Memory(mmap.mmap(-1, size, tagname=name))
    deadline_s = time.monotonic() + timeout_s
    hello = {
        "version": _VERSION,
        "group": group,
        "epoch": epoch,
        "ranks": list(ranks),
        "size": size,
    }
    if rank == ranks[0]:
        return _hand_out(name, hello, deadline_s)
    return _ask(name, hello, rank, deadline_s)


def _name(group: str, epoch: int, ranks: Sequence[int]) -> str:
    user = os.getuid() if sys.platform != "win32" else os.environ.get("USERNAME", "")
    key = hashlib.sha256(f"{user}|{group}|{list(ranks)}".encode()).hexdigest()[:20]
    return f"phalanx-{key}-{epoch}"


def _local_address(name: str) -> str:
    """Linux has names that are no files; elsewhere a folder of the user keeps strangers out."""
    if sys.platform == "linux":
        return f"\0{name}"
    folder = Path(tempfile.gettempdir()) / f"phalanx-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise JoinRefused(f"{folder} belongs to another user")
    return str(folder / name)


def _make(size: int) -> int:
    """A descriptor of fresh memory. Taken from the system now: later, lack of it would kill us."""
    if sys.platform == "linux":
        fd = os.memfd_create("phalanx", os.MFD_CLOEXEC)
    else:
        fd, path = tempfile.mkstemp(prefix="phalanx-")
        os.unlink(path)
    try:
        os.ftruncate(fd, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
    except OSError as exc:
        os.close(fd)
        raise JoinRefused(f"no {size / 2**20:.1f} MiB of shared memory: {exc}") from exc
    return fd


def _hand_out(name: str, hello: Mapping[str, Any], deadline_s: float) -> Memory:
    others = set(hello["ranks"][1:])
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        address = _local_address(name)
        if not address.startswith("\0"):
            Path(address).unlink(missing_ok=True)  # of a process that was killed here
            stack.callback(Path(address).unlink, missing_ok=True)
        try:
            listener.bind(address)
        except OSError as exc:
            raise JoinRefused(
                f"another process is rank {hello['ranks'][0]} of epoch {hello['epoch']} "
                f"already: {exc}"
            ) from exc
        listener.listen(len(others) + 8)
        joined: dict[int, socket.socket] = {}
        while missing := others - set(joined):
            _await_newcomer(listener, joined, missing, deadline_s)
            connection, _ = listener.accept()
            rank = _admit(connection, hello, missing)
            if rank is None:
                connection.close()
            else:
                joined[rank] = stack.enter_context(connection)
        fd = _make(hello["size"])
        try:
            for rank, connection in joined.items():
                try:
                    socket.send_fds(connection, [b"\n"], [fd])
                except OSError as exc:
                    raise PeerLost(rank, f"it left while joining: {exc}") from exc
            return Memory(mmap.mmap(fd, hello["size"]))
        finally:
            os.close(fd)


def _await_newcomer(
    listener: socket.socket,
    joined: Mapping[int, socket.socket],
    missing: set[int],
    deadline_s: float,
) -> None:
    """Return when somebody knocks. Raises PeerLost."""
    left_s = max(0.0, deadline_s - time.monotonic())
    ready, _, _ = select.select([listener, *joined.values()], [], [], left_s)
    for rank, connection in joined.items():
        if connection in ready:  # they have nothing to say but goodbye
            raise PeerLost(rank, "it ended while the group was joining")
    if not ready:
        raise PeerLost(min(missing), f"ranks {sorted(missing)} did not come to join")


def _admit(connection: socket.socket, hello: Mapping[str, Any], missing: set[int]) -> int | None:
    """Hear one newcomer out: its rank, or None after telling it why not."""
    connection.settimeout(1.0)
    try:
        if _owner(connection) != os.getuid():
            return None
        theirs = json.loads(_read_line(connection))
        rank = theirs.pop("rank", None)
        if theirs == hello and rank in missing:
            return int(rank)
        wrong = [key for key in hello if theirs.get(key) != hello[key]] or [f"rank {rank}"]
        reason = f"the group differs in {', '.join(wrong)}"
        connection.sendall(reason.encode() + b"\n")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        pass  # it was none of ours, or is gone: the one that is expected may still come
    return None


def _ask(name: str, hello: Mapping[str, Any], rank: int, deadline_s: float) -> Memory:
    first = hello["ranks"][0]
    with _connect(name, first, deadline_s) as connection:
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        fds: list[int] = []
        try:
            if _owner(connection) != os.getuid():
                raise JoinRefused("the group's socket belongs to another user")
            connection.sendall(json.dumps({**hello, "rank": rank}).encode() + b"\n")
            answer, fds, _, _ = socket.recv_fds(connection, _LINE_BYTES, 1)
        except TimeoutError as exc:
            raise PeerLost(-1, "the group was not complete in time") from exc
        except OSError as exc:
            raise PeerLost(first, f"it left while joining: {exc}") from exc
        if not answer:
            raise PeerLost(first, "it left while joining")
        if not fds:
            raise JoinRefused(answer.decode(errors="replace").strip())
        try:
            return Memory(mmap.mmap(fds[0], hello["size"]))
        finally:
            os.close(fds[0])


def _connect(name: str, first: int, deadline_s: float) -> socket.socket:
    """A connection to the first rank, which may not listen yet."""
    pause = threading.Event()
    tries = 0
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, deadline_s - time.monotonic()))
            connection.connect(_local_address(name))
            return connection
        except OSError as exc:
            connection.close()
            absent = exc.errno in (errno.ECONNREFUSED, errno.ENOENT, errno.EAGAIN)
            if not absent or time.monotonic() >= deadline_s:
                raise PeerLost(first, f"it did not come to join: {exc}") from exc
        pause.wait(_RETRY_S[min(tries, len(_RETRY_S) - 1)])
        tries += 1


def _read_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _LINE_BYTES:
        more = connection.recv(_LINE_BYTES - len(data))
        if not more:
            break
        data += more
    return data


def _owner(connection: socket.socket) -> int:
    """User id of the process at the other end; our own where a folder has checked it."""
    if sys.platform != "linux":
        return os.getuid()
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, user, _ = struct.unpack("3i", credentials)
    return int(user)
