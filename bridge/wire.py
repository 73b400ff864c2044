"""Packets of a distribution link after its handshake: bytes to messages and back, no I/O.

An Encoder and a Decoder belong to one link each and take the flags both sides agreed on
(`handshake.Established.flags`).

Source: erl_dist_protocol, "Protocol between Connected Nodes"; what stock nodes send was
measured.
"""

from __future__ import annotations

import struct
from typing import Final, TypeAlias

from bridge import common_packets
from bridge.control_codec import NO_PAYLOAD, check_control, from_control, to_control
from bridge.control_messages import Message, Tick
from bridge.dist_header import AtomCache
from bridge.errors import ProtocolError
from bridge.etf import decode_term, encode_term
from bridge.flags import Flag
from bridge.fragments import FIRST, FRAGMENT_BYTES, IDS, NEXT, Joiner, cut
from bridge.term import Term

Event: TypeAlias = Message | Tick

TICK: Final = b"\0\0\0\0"  # what to write when there is nothing to say
MAX_MESSAGE_BYTES: Final = 256 << 20
MAX_SEQUENCES: Final = 4096

_LENGTH: Final = struct.Struct(">I")
_WHOLE: Final = b"\x83D"  # 131, 68
_PASS_THROUGH: Final = b"p\x83"  # 112, 131
_TICK_EVENT: Final = Tick()
_HEADERED: Final = int(Flag.FRAGMENTS | Flag.DIST_HDR_ATOM_CACHE)


class Encoder:
    """Messages to packets, in the variants that ``flags`` call for."""

    def __init__(self, flags: int) -> None:
        self._flags = int(flags)
        self._headered = bool(flags & _HEADERED)
        self._may_cut = bool(flags & Flag.FRAGMENTS)
        self._next_sequence_id = 1

    def encode(self, message: Message) -> list[bytes]:
        """Whole packets with their lengths, to be written in order.

        Other messages and ticks may be written between any two of them.

        Raises:
            EncodeError: a term that Erlang cannot hold; nothing is to be written.
        """
        start = common_packets.control(message, self._flags) if self._headered else None
        if start is not None:
            return self._packets(start, message.message)  # type: ignore[union-attr]
        control, payload = to_control(message, self._flags)
        if not self._headered:
            body = encode_term(control, _PASS_THROUGH)
            if payload is not NO_PAYLOAD:
                body = encode_term(payload, body + b"\x83")
            return [_LENGTH.pack(len(body)) + body]
        start = encode_term(control, _WHOLE + b"\0")
        if payload is NO_PAYLOAD:
            return [_LENGTH.pack(len(start)) + start]
        return self._packets(start, payload)

    def _packets(self, start: bytes, payload: Term) -> list[bytes]:
        body = encode_term(payload, start)
        if len(body) <= FRAGMENT_BYTES or not self._may_cut:
            return [_LENGTH.pack(len(body)) + body]
        sequence_id = self._next_sequence_id
        self._next_sequence_id += 1
        packets = cut(sequence_id, start[len(_WHOLE) :], body[len(start) :])
        return [_LENGTH.pack(len(packet)) + packet for packet in packets]


class Decoder:
    """Bytes to messages, as they arrive; memory grows with what arrived, never by a length.

    Args:
        flags: agreed by both sides.
        max_message_bytes: of one packet, and of all unfinished fragments together.
        max_sequences: fragmented messages that may be unfinished at a time.
    """

    def __init__(
        self,
        flags: int,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        self._headered = bool(flags & _HEADERED)
        self._max_bytes = max_message_bytes
        self._rest = bytearray()
        self._cache = AtomCache()
        self._joiner = Joiner(max_bytes=max_message_bytes, max_sequences=max_sequences)

    def feed(self, data: bytes) -> list[Event]:
        """All messages that ``data`` completes, in the order they were sent.

        Raises:
            ProtocolError, DecodeError: the peer is broken: close the link. What came before the
                bad packet in the same ``data`` is lost with it, as on any lost link.
        """
        if self._rest:
            self._rest += data
            if not self._complete(self._rest):
                return []
            data = bytes(self._rest)
            self._rest.clear()
        events: list[Event] = []
        pos, end = 0, len(data)
        while end - pos >= 4:
            (size,) = _LENGTH.unpack_from(data, pos)
            if size > self._max_bytes:
                raise ProtocolError(f"packet of {size} bytes: the limit is {self._max_bytes}")
            stop = pos + 4 + size
            if stop > end:
                break
            if size:
                message = self._packet(data[pos + 4 : stop])
                if message is not None:
                    events.append(message)
            else:
                events.append(_TICK_EVENT)
            pos = stop
        if pos < end:
            self._rest += memoryview(data)[pos:]
        return events

    def _complete(self, rest: bytearray) -> bool:
        if len(rest) < 4:
            return False
        (size,) = _LENGTH.unpack_from(rest)
        return bool(size > self._max_bytes or len(rest) >= 4 + size)

    def _packet(self, packet: bytes) -> Message | None:
        if self._headered:
            message = common_packets.read(packet)
            if message is not None:
                return message
        kind = packet[:2]
        if kind == (_WHOLE if self._headered else _PASS_THROUGH):
            atom_table: list[Term] = []
            pos = 2
            if self._headered:
                atom_table, pos = self._cache.read_header(packet, pos)
            found, pos = decode_term(packet, pos, atom_table)
            control, has_payload = check_control(found)
            if not has_payload:
                if pos != len(packet):
                    raise ProtocolError(f"{len(packet) - pos} bytes after control {control[0]}")
                return from_control(control, NO_PAYLOAD)
            if not self._headered:
                if packet[pos : pos + 1] != b"\x83":
                    raise ProtocolError("message without its version byte")
                pos += 1
            return _deliver(control, packet, pos, atom_table)
        if self._headered and kind in (FIRST, NEXT):
            return self._fragment(packet, kind)
        raise ProtocolError(f"packet begins with {kind!r}: not what was agreed")

    def _fragment(self, packet: bytes, kind: bytes) -> Message | None:
        if len(packet) < 2 + IDS.size:
            raise ProtocolError("fragment cut short")
        sequence_id, fragment_id = IDS.unpack_from(packet, 2)
        pos = 2 + IDS.size
        if kind == NEXT:
            done = self._joiner.add(sequence_id, fragment_id, packet[pos:])
            if done is None:
                return None
            control, atom_table, payload = done
            return _deliver(control, payload, 0, atom_table)
        atom_table, pos = self._cache.read_header(packet, pos)
        found, pos = decode_term(packet, pos, atom_table)
        control, has_payload = check_control(found)
        if not has_payload or fragment_id < 1:
            raise ProtocolError(f"control {control[0]} in {fragment_id} fragments")
        if fragment_id == 1:
            return _deliver(control, packet, pos, atom_table)
        self._joiner.start(sequence_id, fragment_id, control, atom_table, packet[pos:])
        return None


def _deliver(control: tuple[Term, ...], data: bytes, pos: int, atom_table: list[Term]) -> Message:
    payload, end = decode_term(data, pos, atom_table)
    if end != len(data):
        raise ProtocolError(f"{len(data) - end} bytes after the message of {control[0]}")
    return from_control(control, payload)
