"""Digests of the chunks of a file, kept beside the store so that each chunk is hashed once.

A file of 32 bytes a chunk; zeros stand for one that is not known. They hold for a file of one
size and time of change, which their owner notes.
"""

from __future__ import annotations

import contextlib
import threading
from io import RawIOBase
from pathlib import Path

from control.peer_files.chunks import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    NO_DIGEST,
    digest_of,
    num_chunks,
    span,
)


class Digests:
    """Of one file. Any thread may call."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Reads what is known. ``path`` is where it is kept; made at the first digest."""
        self._path, self._size_bytes = path, size_bytes
        self._lock = threading.Lock()
        self._all = bytearray(num_chunks(size_bytes) * DIGEST_BYTES)
        with contextlib.suppress(OSError):
            known = path.read_bytes()[: len(self._all)]
            self._all[: len(known)] = known

    def get(self, chunk: int) -> bytes | None:
        """None while it is not known."""
        at = chunk * DIGEST_BYTES
        found = bytes(self._all[at : at + DIGEST_BYTES])
        return None if found == NO_DIGEST or len(found) < DIGEST_BYTES else found

    def put(self, first: int, digests: bytes) -> None:
        """Of chunks in a row. Raises OSError."""
        at = first * DIGEST_BYTES
        with self._lock:
            if not self._path.exists():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch()
            with self._path.open("r+b", buffering=0) as file:
                file.seek(at)
                file.write(digests)
            self._all[at : at + len(digests)] = digests

    def known(self) -> set[int]:
        """Chunks that have one."""
        return {
            chunk for chunk in range(num_chunks(self._size_bytes)) if self.get(chunk) is not None
        }

    def of_file(self, path: Path, first: int, count: int) -> bytes:
        """Digests of chunks of ``path``, those that are not known worked out and kept.

        Raises:
            OSError: it cannot be read; ValueError: it has no such chunks.
        """
        if not 0 <= first < first + count <= num_chunks(self._size_bytes):
            raise ValueError(f"{path.name} has no chunks {first} to {first + count}")
        found = [self.get(chunk) for chunk in range(first, first + count)]
        if None in found:
            buffer = memoryview(bytearray(CHUNK_BYTES))
            with path.open("rb", buffering=0) as file:
                for at, digest in enumerate(found):
                    if digest is None:
                        start, stop = span(first + at, 1, self._size_bytes)
                        file.seek(start)
                        found[at] = digest_of(_fill(file, buffer[: stop - start]))
            whole = b"".join(digest for digest in found if digest is not None)
            with contextlib.suppress(OSError):  # a full disk: it is worked out again next time
                self.put(first, whole)
            return whole
        return b"".join(digest for digest in found if digest is not None)


def _fill(file: RawIOBase, part: memoryview) -> memoryview:
    got = 0
    while got < len(part):
        size = file.readinto(part[got:])
        if not size:
            raise OSError(f"the file ends {len(part) - got} bytes too early")
        got += size
    return part
