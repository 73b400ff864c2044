"""The signals that nearly all packets carry, read and written straight from and to bytes.

Only what is plain: an empty atom table, no fragments, and identifiers and names that have been seen
before. For anything else there is None, and the general codec (`wire`, `control_codec`) has it;
both give the same messages and bytes, which a test compares.
"""

from __future__ import annotations

import struct
from typing import Final

from bridge.control_messages import Demonitor, Message, Monitor, Send, SendAlias, SendName
from bridge.errors import EncodeError
from bridge.etf import decode_term, encode_term
from bridge.etf_decode import identifier_at, known_atom, known_identifier
from bridge.flags import Flag
from bridge.term import Atom, Pid, Ref

# Pass-through header, then a control tuple of 3 or 4 with its operation to come.
_OF_3: Final = b"\x83D\0h\x03a"
_OF_4: Final = b"\x83D\0h\x04a"
_NO_COOKIE: Final = b"w\0"

_SEND: Final = _OF_3 + b"\x16"  # {22, From, To}
_SEND_NAME: Final = _OF_4 + b"\x06"  # {6, From, '', Name}
_SEND_ALIAS: Final = _OF_3 + b"\x21"  # {33, From, Alias}
_SEND_ALTACT: Final = _OF_4 + b"\x25a\x04"  # {37, alias, From, Alias}

_ALTACT_SIG: Final = int(Flag.ALTACT_SIG)
_SEND_SENDER: Final = int(Flag.SEND_SENDER)


def read(packet: bytes) -> Message | None:
    """The message of a whole packet (without its length), if it is one of the common ones.

    Raises:
        DecodeError: an identifier, or the term that follows, is broken.
    """
    try:
        head = packet[:6]
        if head == _OF_4:
            return _read_4(packet)
        return _read_3(packet) if head == _OF_3 else None
    except (IndexError, struct.error, EncodeError):  # broken: the general codec says how
        return None


def _read_3(packet: bytes) -> Message | None:
    op = packet[6]
    middle = 22 + packet[9]  # the end of a pid whose node is a SMALL_ATOM_UTF8
    sender = known_identifier(packet[7:middle])
    if type(sender) is not Pid:
        return None
    if op == 22:
        stop = middle + 15 + packet[middle + 2]
        to = known_identifier(packet[middle:stop])
        if type(to) is Pid:
            message, end = decode_term(packet, stop)
            return Send(sender, to, message) if end == len(packet) else None
    elif op == 33:
        to, stop = identifier_at(packet, middle)
        if type(to) is Ref:
            message, end = decode_term(packet, stop)
            return SendAlias(sender, to, message) if end == len(packet) else None
    return None


def _read_4(packet: bytes) -> Message | None:
    op = packet[6]
    start = 9 if op == 37 else 7
    middle = start + 15 + packet[start + 2]
    sender = known_identifier(packet[start:middle])
    if type(sender) is not Pid:
        return None
    if op == 6:
        stop = middle + 4 + packet[middle + 3]
        name = known_atom(packet[middle + 2 : stop])
        if type(name) is Atom and packet[middle : middle + 2] == _NO_COOKIE:
            message, end = decode_term(packet, stop)
            return SendName(sender, name, message) if end == len(packet) else None
    elif op == 19 or op == 20:
        if packet[middle] == 119:
            stop = middle + 2 + packet[middle + 1]
            target = known_atom(packet[middle:stop])
        else:
            target, stop = identifier_at(packet, middle)
        ref, end = identifier_at(packet, stop)
        if type(ref) is Ref and (type(target) is Atom or type(target) is Pid):
            kind = Monitor if op == 19 else Demonitor
            return kind(sender, target, ref) if end == len(packet) else None
    elif op == 37 and packet[7:9] == b"a\x04":
        to, stop = identifier_at(packet, middle)
        if type(to) is Ref:
            message, end = decode_term(packet, stop)
            return SendAlias(sender, to, message) if end == len(packet) else None
    return None


def control(message: Message, flags: int) -> bytes | None:
    """What precedes the term in a packet with an empty header, for the common messages."""
    if type(message) is SendAlias:
        if message.priority:
            return None
        head = _SEND_ALTACT if flags & _ALTACT_SIG else _SEND_ALIAS
        return head + message.sender.wire + message.to.wire
    if type(message) is Send:
        if message.priority or message.sender is None or not flags & _SEND_SENDER:
            return None
        return _SEND + message.sender.wire + message.to.wire
    if type(message) is SendName:
        if message.priority:
            return None
        return encode_term(message.to, _SEND_NAME + message.sender.wire + _NO_COOKIE)
    return None
