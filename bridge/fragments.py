"""Messages in fragments: cutting ours, joining a peer's, several at a time.

Source: erl_dist_protocol, "Distribution Header for Fragmented Messages": fragment ids count
down to 1, and the control message is whole in the first fragment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bridge.errors import ProtocolError
from bridge.term import Term

FRAGMENT_BYTES: Final = 64 * 1024  # as OTP
FIRST: Final = b"\x83E"  # 131, 69
NEXT: Final = b"\x83F"  # 131, 70
IDS: Final = struct.Struct(">QQ")


def cut(sequence_id: int, control: bytes, payload: bytes) -> Iterator[bytes]:
    """Packets (without their length) of one message.

    Args:
        control: the encoded control tuple, headed by the packet's atom table.
        payload: the encoded message, at least one byte.
    """
    starts = range(0, len(payload), FRAGMENT_BYTES)
    for fragment_id, start in zip(range(len(starts), 0, -1), starts, strict=True):
        head = NEXT if start else FIRST
        body = payload[start : start + FRAGMENT_BYTES]
        ids = IDS.pack(sequence_id, fragment_id)
        yield b"".join((head, ids, body) if start else (head, ids, control, body))


@dataclass(slots=True)
class _Sequence:
    control: tuple[Term, ...]
    atom_table: list[Term]
    next_id: int
    parts: list[bytes]


class Joiner:
    """The unfinished sequences of one link.

    Args:
        max_bytes: of all unfinished sequences together.
        max_sequences: how many may be unfinished at a time.
    """

    def __init__(self, *, max_bytes: int, max_sequences: int) -> None:
        self._max_bytes, self._max_sequences = max_bytes, max_sequences
        self._sequences: dict[int, _Sequence] = {}
        self._num_bytes = 0

    def start(
        self,
        sequence_id: int,
        fragment_id: int,
        control: tuple[Term, ...],
        atom_table: list[Term],
        body: bytes,
    ) -> None:
        """Take the first of two or more fragments. Raises ProtocolError."""
        if sequence_id in self._sequences:
            raise ProtocolError(f"fragment sequence {sequence_id} started twice")
        if len(self._sequences) >= self._max_sequences:
            raise ProtocolError(f"more than {self._max_sequences} unfinished fragment sequences")
        self._count(body)
        self._sequences[sequence_id] = _Sequence(control, atom_table, fragment_id - 1, [body])

    def add(
        self, sequence_id: int, fragment_id: int, body: bytes
    ) -> tuple[tuple[Term, ...], list[Term], bytes] | None:
        """Take a later fragment: control, atom table and payload if it was the last.

        Raises:
            ProtocolError: unknown sequence, wrong order, or too much memory.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None or fragment_id != sequence.next_id:
            raise ProtocolError(f"fragment {fragment_id} of sequence {sequence_id} out of order")
        self._count(body)
        if body:  # or a peer could add empty parts for ever
            sequence.parts.append(body)
        sequence.next_id -= 1
        if fragment_id > 1:
            return None
        del self._sequences[sequence_id]
        payload = b"".join(sequence.parts)
        self._num_bytes -= len(payload)
        return sequence.control, sequence.atom_table, payload

    def _count(self, body: bytes) -> None:
        self._num_bytes += len(body)
        if self._num_bytes > self._max_bytes:
            raise ProtocolError(f"fragments of more than {self._max_bytes} bytes in flight")
