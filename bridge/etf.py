"""External term format with its version byte: what `term_to_binary` makes.

`encode_term` and `decode_term` are the same without the version byte, for the packets of
a distribution link.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from bridge.errors import DecodeError
from bridge.etf_decode import decode_term
from bridge.etf_encode import MAX_DEPTH, encode_term
from bridge.term import LocalTerm, Term

__all__ = ["MAX_DEPTH", "VERSION", "decode", "decode_term", "encode", "encode_term"]

VERSION: Final = 131
MAX_INFLATED_BYTES: Final = 64 << 20

_COMPRESSED: Final = 80
_LOCAL: Final = 121


def encode(term: Term) -> bytes:
    """``term_to_binary(term)``. Raises EncodeError."""
    return encode_term(term, b"\x83")


def decode(data: bytes, *, max_inflated_bytes: int = MAX_INFLATED_BYTES) -> Term:
    """``binary_to_term(data)``: exactly one term, nothing after it.

    Args:
        max_inflated_bytes: largest compressed term that is unpacked.

    Raises:
        DecodeError: whatever is wrong with the bytes.
    """
    if len(data) < 2 or data[0] != VERSION:
        raise DecodeError(f"no external term: {data[:8]!r}")
    pos, tag = 1, data[1]
    if tag == _COMPRESSED:
        data, pos = _inflate(data, max_inflated_bytes), 0
        tag = data[0] if data else 0
    if tag == _LOCAL:
        return LocalTerm(data[pos + 1 :])
    term, end = decode_term(data, pos)
    if end != len(data):
        raise DecodeError(f"{len(data) - end} bytes after the term")
    return term


def _inflate(data: bytes, max_inflated_bytes: int) -> bytes:
    """Unpack a compressed term, never to more than the size it announces."""
    if len(data) < 6:
        raise DecodeError("compressed term cut short")
    (size,) = struct.unpack_from(">I", data, 2)
    if size > max_inflated_bytes:
        raise DecodeError(f"compressed term of {size} bytes: the limit is {max_inflated_bytes}")
    unpacker = zlib.decompressobj()
    try:
        # One byte more than announced, so that a longer stream shows itself.
        found = unpacker.decompress(memoryview(data)[6:], size + 1)
    except zlib.error as exc:
        raise DecodeError(f"compressed term: {exc}") from exc
    if len(found) != size or not unpacker.eof or unpacker.unused_data:
        raise DecodeError(f"compressed term announces {size} bytes and does not hold them")
    return found
