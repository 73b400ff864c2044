"""Files as chunks of one size: the grid on which they are checked, asked for and noted. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

CHUNK_BYTES: Final = 1 << 20
DIGEST_BYTES: Final = 32
MAX_RUN_CHUNKS: Final = 16  # of one request
NO_DIGEST: Final = bytes(DIGEST_BYTES)

Ranges = Sequence[tuple[int, int]]


def num_chunks(size_bytes: int) -> int:
    """Chunks of a file; the last one may be short."""
    return -(-size_bytes // CHUNK_BYTES)


def span(first: int, count: int, size_bytes: int) -> tuple[int, int]:
    """Bytes ``start`` to ``stop`` of some chunks in a row."""
    return first * CHUNK_BYTES, min((first + count) * CHUNK_BYTES, size_bytes)


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """What a chunk is checked by."""
    return hashlib.sha256(data).digest()


def touched(ranges: Ranges, size_bytes: int) -> list[int]:
    """Numbers of the chunks that hold any byte of ``ranges``, in order, each once."""
    found: set[int] = set()
    for start, stop in ranges:
        stop = min(stop, size_bytes)
        if start < stop:
            found.update(range(start // CHUNK_BYTES, (stop - 1) // CHUNK_BYTES + 1))
    return sorted(found)


def covered(ranges: Ranges, size_bytes: int) -> set[int]:
    """Numbers of the chunks that ``ranges`` hold whole; they are in order and apart."""
    found: set[int] = set()
    for start, stop in ranges:
        last = stop // CHUNK_BYTES if stop < size_bytes else num_chunks(size_bytes)
        found.update(range(-(-start // CHUNK_BYTES), last))
    return found


def as_ranges(chunks: Iterable[int], size_bytes: int) -> tuple[tuple[int, int], ...]:
    """Bytes of chunks, those in a row as one range."""
    return tuple(span(run.start, len(run), size_bytes) for run in rows_of(chunks))


def rows_of(chunks: Iterable[int], longest: int = 1 << 62) -> list[range]:
    """Chunks in a row as ranges of numbers, none longer than ``longest``."""
    out: list[range] = []
    for chunk in sorted(chunks):
        if out and chunk == out[-1].stop and len(out[-1]) < longest:
            out[-1] = range(out[-1].start, chunk + 1)
        else:
            out.append(range(chunk, chunk + 1))
    return out
