"""The distribution handshake, version 6, for both roles: bytes in, bytes out, no I/O.

    machine = Initiator(local, peer_name, still_pending=...)     or Acceptor(local, decide=...)
    write(machine.data_to_send())
    while machine.established is None:
        machine.receive(read())        # HandshakeError: write data_to_send(), then close
        write(machine.data_to_send())

What only the node can know is asked of it: an Acceptor calls ``decide`` once it knows who
calls (name collisions, simultaneous connects, dynamic names), an Initiator ``still_pending``
when the other side has a link to us already.

Source: erl_dist_protocol, "Distribution Handshake"; OTP ``dist_util.erl``.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeAlias

from bridge.errors import HandshakeError
from bridge.flags import VISIBLE_NODE, Flag, expand, missing

SETUP_TIMEOUT_S: Final = 7.0  # OTP's net_setuptime

_MAX_FRAME_BYTES: Final = 2048  # a name has at most 255 characters on either side of its "@"
_NAME: Final = struct.Struct(">cQIH")  # 'N', flags, creation, length of the name
_CHALLENGE: Final = struct.Struct(">cQIIH")  # 'N', flags, challenge, creation, length
_REPLY: Final = struct.Struct(">cI16s")  # 'r', challenge, digest
_ACK: Final = struct.Struct(">c16s")  # 'a', digest


class Status(StrEnum):
    """What an acceptor answers."""

    OK = "ok"
    OK_SIMULTANEOUS = "ok_simultaneous"  # go on; I drop my own attempt towards you
    NOK = "nok"  # give up; my own attempt towards you goes on
    NOT_ALLOWED = "not_allowed"
    ALIVE = "alive"  # I have a link to you: is it dead?


@dataclass(frozen=True, slots=True)
class Named:
    """An acceptor's answer to a caller without a name: its full name and creation."""

    name: str
    creation: int


Decision: TypeAlias = Status | Named


@dataclass(frozen=True, slots=True)
class Local:
    """This side: ``name`` is ``NAME@HOST``; the cookie is never printed.

    ``length_bytes`` is the size of a frame's length: 2, or 4 over TLS.
    """

    name: str
    cookie: str = field(repr=False)
    creation: int
    flags: int = VISIBLE_NODE
    length_bytes: int = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """Who knocks. ``wants_name``: ``name`` is its host only, and it asks for a full name."""

    name: str
    flags: int
    creation: int
    wants_name: bool

    @property
    def visible(self) -> bool:
        return bool(self.flags & Flag.PUBLISHED)


@dataclass(frozen=True, slots=True)
class Established:
    """A handshake that both sides accepted.

    Attributes:
        flags: what both can do: for wire.Encoder and wire.Decoder.
        visible: whether the peer is to be listed in ``nodes()``.
        local_name, local_creation: ours; they differ from Local's if the peer named us.
        rest: bytes of the first packets, read too far.
    """

    peer_name: str
    peer_creation: int
    peer_flags: int
    flags: int
    visible: bool
    local_name: str
    local_creation: int
    rest: bytes


def digest(cookie: str, challenge: int) -> bytes:
    """16 bytes: MD5 of the cookie and the other side's challenge in decimal."""
    # MD5 is the protocol's choice; it proves a shared secret and protects nothing else.
    return hashlib.md5(f"{cookie}{challenge}".encode(), usedforsecurity=False).digest()


class _Machine:
    """Frames in, frames out; the conversation itself is a generator that asks for frames."""

    def __init__(self, local: Local, challenge: int | None) -> None:
        self._local = local
        self._challenge = secrets.randbits(32) if challenge is None else challenge
        self._in = bytearray()
        self._out = bytearray()
        self.established: Established | None = None
        self._talk = self._conversation()
        self._failed = False
        next(self._talk)

    def _conversation(self) -> Generator[None, bytes, None]:
        raise NotImplementedError

    def data_to_send(self) -> bytes:
        """What is to be written now; each byte is handed out once."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def receive(self, data: bytes) -> None:
        """Take bytes of the peer, cut anywhere.

        Raises:
            HandshakeError: it failed, also before: write `data_to_send`, then close.
        """
        if self._failed or self.established is not None:
            raise HandshakeError("bytes for a handshake that is over")
        self._in += data
        try:
            while self.established is None and (frame := self._next_frame()) is not None:
                try:
                    self._talk.send(frame)
                except StopIteration:
                    break
                except struct.error:
                    raise HandshakeError(f"bad handshake message: {frame[:40]!r}") from None
        except HandshakeError:
            self._failed = True
            raise

    def _next_frame(self) -> bytes | None:
        head = self._local.length_bytes
        if len(self._in) < head:
            return None
        size = int.from_bytes(self._in[:head], "big")
        if not 1 <= size <= _MAX_FRAME_BYTES:
            raise HandshakeError(f"handshake message of {size} bytes")
        if len(self._in) < head + size:
            return None
        frame = bytes(self._in[head : head + size])
        del self._in[: head + size]
        return frame

    def _write(self, frame: bytes) -> None:
        self._out += len(frame).to_bytes(self._local.length_bytes, "big") + frame

    def _check_digest(self, found: bytes) -> None:
        if not hmac.compare_digest(found, digest(self._local.cookie, self._challenge)):
            raise HandshakeError("the cookies differ")

    def _finish(
        self, peer_name: str, peer_creation: int, peer_flags: int, named: Named | None
    ) -> None:
        rest = bytes(self._in)
        self._in.clear()
        self.established = Established(
            peer_name=peer_name,
            peer_creation=peer_creation,
            peer_flags=peer_flags,
            flags=expand(peer_flags) & expand(self._local.flags),
            visible=bool(peer_flags & Flag.PUBLISHED),
            local_name=named.name if named else self._local.name,
            local_creation=named.creation if named else self._local.creation,
            rest=rest,
        )


class Initiator(_Machine):
    """The side that connects.

    Args:
        local: with the flag NAME_ME and only a host as its name, the peer names us.
        peer_name: full name of the node that must answer; None takes whoever does.
        still_pending: asked when the peer says ``alive``: is this attempt still wanted, the
            old link being dead? False gives up.
    """

    def __init__(
        self,
        local: Local,
        peer_name: str | None,
        *,
        still_pending: Callable[[], bool] = lambda: True,
        challenge: int | None = None,
    ) -> None:
        self._peer_name = peer_name
        self._still_pending = still_pending
        super().__init__(local, challenge)

    def _conversation(self) -> Generator[None, bytes, None]:
        local = self._local
        own_name = local.name.encode()
        self._write(_NAME.pack(b"N", local.flags, local.creation, len(own_name)) + own_name)
        frame = yield
        named = self._status(frame)
        frame = yield
        tag, flags, challenge, creation, size = _CHALLENGE.unpack_from(frame)
        name = _name_of(frame, _CHALLENGE.size, size)
        if tag != b"N":
            raise HandshakeError(f"challenge expected, got {frame[:1]!r}")
        if self._peer_name not in (None, name):
            raise HandshakeError(f"node {name} answers where {self._peer_name} was called")
        if lack := missing(flags):
            raise HandshakeError(f"node {name} lacks {', '.join(lack)}")
        if local.flags & Flag.NAME_ME and not (named and flags & Flag.NAME_ME):
            raise HandshakeError(f"node {name} gives out no names")
        self._write(_REPLY.pack(b"r", self._challenge, digest(local.cookie, challenge)))
        frame = yield
        tag, found = _ACK.unpack(frame)
        if tag != b"a":
            raise HandshakeError(f"challenge ack expected, got {frame[:1]!r}")
        self._check_digest(found)
        self._finish(name, creation, flags, named)

    def _status(self, frame: bytes) -> Named | None:
        """Handle the status message; the name if the peer gave us one."""
        if frame[:1] != b"s":
            raise HandshakeError(f"status expected, got {frame[:1]!r}")
        status = frame[1:]
        if status in (b"ok", b"ok_simultaneous"):
            return None
        if status == b"alive":
            if not self._still_pending():
                self._write(b"sfalse")
                raise HandshakeError(f"{self._peer_name} is connected already")
            self._write(b"strue")
            return None
        if status.startswith(b"named:") and self._local.flags & Flag.NAME_ME:
            start = 1 + len(b"named:")
            (size,) = struct.unpack_from(">H", frame, start)
            name = _name_of(frame, start + 2, size, tail=4)
            (creation,) = struct.unpack_from(">I", frame, start + 2 + size)
            return Named(name, creation)
        raise HandshakeError(f"{self._peer_name} answers {status[:40].decode('latin-1')}")


class Acceptor(_Machine):
    """The side that was connected to.

    Args:
        decide: called once, when the caller's name is known and its flags suffice; a Named
            exactly if the caller wants a name. NOK and NOT_ALLOWED end the handshake.
    """

    def __init__(
        self,
        local: Local,
        *,
        decide: Callable[[Caller], Decision],
        challenge: int | None = None,
    ) -> None:
        self._decide = decide
        super().__init__(local, challenge)

    def _conversation(self) -> Generator[None, bytes, None]:
        local = self._local
        frame = yield
        caller = self._caller(frame)
        decision = self._decide(caller)
        peer_name, peer_creation, flags = caller.name, caller.creation, local.flags
        if isinstance(decision, Named):
            text = decision.name.encode()
            tail = len(text).to_bytes(2, "big") + text + decision.creation.to_bytes(4, "big")
            self._write(b"snamed:" + tail)
            peer_name, peer_creation = decision.name, decision.creation
            flags |= Flag.NAME_ME  # or the caller drops the link
        else:
            self._write(b"s" + decision.encode())
            if decision in (Status.NOK, Status.NOT_ALLOWED):
                raise HandshakeError(f"{caller.name} was answered {decision}")
            if decision is Status.ALIVE:
                frame = yield
                if frame != b"strue":
                    raise HandshakeError(f"{caller.name} gave up: it is connected already")
        own_name = local.name.encode()
        head = (b"N", flags, self._challenge, local.creation, len(own_name))
        self._write(_CHALLENGE.pack(*head) + own_name)
        frame = yield
        tag, challenge, found = _REPLY.unpack(frame)
        if tag != b"r":
            raise HandshakeError(f"challenge reply expected, got {frame[:1]!r}")
        self._check_digest(found)
        self._write(_ACK.pack(b"a", digest(local.cookie, challenge)))
        self._finish(peer_name, peer_creation, caller.flags, None)

    def _caller(self, frame: bytes) -> Caller:
        if frame[:1] == b"n":
            raise HandshakeError("handshake of version 5: OTP 23 or later is needed")
        if frame[:1] != b"N":
            raise HandshakeError(f"name expected, got {frame[:1]!r}")
        _, flags, creation, size = _NAME.unpack_from(frame)
        name = _name_of(frame, _NAME.size, size)
        if lack := missing(flags):
            self._write(b"s" + Status.NOT_ALLOWED.encode())
            raise HandshakeError(f"{name} lacks {', '.join(lack)}")
        wants_name = bool(flags & Flag.NAME_ME)
        if not wants_name and not _is_node_name(name):
            raise HandshakeError(f"{name!r} is no node name")
        return Caller(name, flags, creation, wants_name)


def _is_node_name(name: str) -> bool:
    alive, at, host = name.partition("@")
    return bool(alive and at and host) and "@" not in host and name.isprintable()


def _name_of(frame: bytes, start: int, size: int, *, tail: int = 0) -> str:
    # OTP lets future versions add to a message: more bytes are no error.
    text = frame[start : start + size]
    if not size or len(text) != size or len(frame) < start + size + tail:
        raise HandshakeError("handshake message cut short")
    try:
        name = text.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise HandshakeError(f"node name is not UTF-8: {text[:40]!r}") from exc
    if len(name) > 255:
        raise HandshakeError(f"node name of {len(name)} characters")
    return name
