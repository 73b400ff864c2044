"""The handshake machines against each other and against bad bytes."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import HandshakeError
from bridge.flags import HIDDEN_NODE, MANDATORY, VISIBLE_NODE, Flag, expand, missing
from bridge.handshake import (
    Acceptor,
    Caller,
    Decision,
    Established,
    Initiator,
    Local,
    Named,
    Status,
    digest,
)
from bridge.handshake_io import perform

A = Local("a@127.0.0.1", "secret", 11)
B = Local("b@127.0.0.1", "secret", 22)


def meet(
    initiator: Initiator, acceptor: Acceptor, chunk_bytes: int = 4096
) -> tuple[Established, Established]:
    """Carry bytes between both until both are done."""
    while initiator.established is None or acceptor.established is None:
        moved = False
        for source, target in ((initiator, acceptor), (acceptor, initiator)):
            data = source.data_to_send()
            for start in range(0, len(data), chunk_bytes):
                target.receive(data[start : start + chunk_bytes])
                moved = True
        assert moved, "both wait for each other"
    return initiator.established, acceptor.established


def accept(_: Caller) -> Decision:
    return Status.OK


@pytest.mark.parametrize("chunk_bytes", [1, 2, 5, 4096])
@pytest.mark.parametrize("status", [Status.OK, Status.OK_SIMULTANEOUS, Status.ALIVE])
def test_two_nodes_meet(status: Status, chunk_bytes: int) -> None:
    seen: list[Caller] = []

    def decide(caller: Caller) -> Decision:
        seen.append(caller)
        return status

    hidden = Local("a@127.0.0.1", "secret", 11, HIDDEN_NODE)
    here, there = meet(Initiator(hidden, B.name), Acceptor(B, decide=decide), chunk_bytes)
    assert seen == [Caller("a@127.0.0.1", HIDDEN_NODE, 11, False)]
    assert not seen[0].visible
    assert (here.peer_name, here.peer_creation, here.visible) == ("b@127.0.0.1", 22, True)
    assert (there.peer_name, there.peer_creation, there.visible) == ("a@127.0.0.1", 11, False)
    assert here.flags == there.flags == HIDDEN_NODE
    assert (here.local_name, here.local_creation) == ("a@127.0.0.1", 11)


def test_a_node_without_a_name_is_given_one() -> None:
    nameless = Local("127.0.0.1", "secret", 0, HIDDEN_NODE | Flag.NAME_ME)
    asked: list[Caller] = []

    def decide(caller: Caller) -> Decision:
        asked.append(caller)
        return Named("u1@127.0.0.1", 99)

    here, there = meet(Initiator(nameless, B.name), Acceptor(B, decide=decide))
    assert asked[0].wants_name
    assert asked[0].name == "127.0.0.1"
    assert (here.local_name, here.local_creation) == ("u1@127.0.0.1", 99)
    assert (there.peer_name, there.peer_creation) == ("u1@127.0.0.1", 99)


def test_a_peer_that_gives_no_names_is_left() -> None:
    nameless = Local("127.0.0.1", "secret", 0, HIDDEN_NODE | Flag.NAME_ME)
    with pytest.raises(HandshakeError, match="gives out no names"):
        meet(Initiator(nameless, B.name), Acceptor(B, decide=accept))


def test_the_digest_is_the_protocols() -> None:
    assert digest("secret", 4_000_000_000) == hashlib.md5(b"secret4000000000").digest()


@pytest.mark.parametrize("status", [Status.NOK, Status.NOT_ALLOWED])
def test_a_refusal_is_told_and_ends_both_sides(status: Status) -> None:
    initiator, acceptor = Initiator(A, B.name), Acceptor(B, decide=lambda _: status)
    with pytest.raises(HandshakeError, match=f"a@127.0.0.1 was answered {status}"):
        acceptor.receive(initiator.data_to_send())
    with pytest.raises(HandshakeError, match=f"b@127.0.0.1 answers {status}"):
        initiator.receive(acceptor.data_to_send())


def test_an_alive_link_is_kept_if_the_caller_says_so() -> None:
    initiator = Initiator(A, B.name, still_pending=lambda: False)
    acceptor = Acceptor(B, decide=lambda _: Status.ALIVE)
    acceptor.receive(initiator.data_to_send())
    with pytest.raises(HandshakeError, match="connected already"):
        initiator.receive(acceptor.data_to_send())
    with pytest.raises(HandshakeError, match="gave up"):
        acceptor.receive(initiator.data_to_send())


def test_a_wrong_cookie_is_refused_by_the_acceptor_and_told_nothing() -> None:
    stranger = Local("a@127.0.0.1", "guess", 11)
    initiator, acceptor = Initiator(stranger, B.name), Acceptor(B, decide=accept)
    acceptor.receive(initiator.data_to_send())
    initiator.receive(acceptor.data_to_send())
    with pytest.raises(HandshakeError, match="cookies differ"):
        acceptor.receive(initiator.data_to_send())
    assert acceptor.data_to_send() == b""
    assert acceptor.established is None


def frame(body: bytes) -> bytes:
    return struct.pack(">H", len(body)) + body


def challenge(name: bytes = b"b@127.0.0.1", flags: int = VISIBLE_NODE) -> bytes:
    return struct.pack(">cQIIH", b"N", flags, 5, 22, len(name)) + name


def hello(
    name: bytes = b"a@127.0.0.1", flags: int = VISIBLE_NODE, size: int | None = None
) -> bytes:
    return struct.pack(">cQIH", b"N", flags, 11, len(name) if size is None else size) + name


def test_a_wrong_cookie_is_refused_by_the_initiator() -> None:
    initiator = Initiator(A, B.name)
    initiator.receive(frame(b"sok") + frame(challenge()))
    with pytest.raises(HandshakeError, match="cookies differ"):
        initiator.receive(frame(b"a" + bytes(16)))


def test_names_and_cookies_are_not_printed_with_the_cookie() -> None:
    assert "secret" not in repr(A)


def _bits(flags: int) -> list[int]:
    return [1 << bit for bit in range(64) if flags >> bit & 1]


@pytest.mark.parametrize("flag", _bits(MANDATORY))
def test_each_mandatory_flag_is_demanded(flag: int) -> None:
    flags = MANDATORY & ~flag
    acceptor = Acceptor(B, decide=accept)
    with pytest.raises(HandshakeError, match=f"lacks {Flag(flag).name}"):
        acceptor.receive(frame(hello(flags=flags)))
    assert acceptor.data_to_send() == frame(b"snot_allowed")
    initiator = Initiator(A, B.name)
    with pytest.raises(HandshakeError, match=f"lacks {Flag(flag).name}"):
        initiator.receive(frame(b"sok") + frame(challenge(flags=flags)))


def test_what_stock_nodes_send_is_enough() -> None:
    for flags in (0x2D07DF7FBC, 0xD07DF7FBC, MANDATORY):
        assert missing(flags) == []
    assert MANDATORY == 0x403070F94
    short = Flag.MANDATORY_25_DIGEST | Flag.UNLINK_ID | Flag.V4_NC
    assert missing(short) == []
    assert expand(short) & MANDATORY == MANDATORY
    otp28 = 0x2D07DF7FBC
    assert HIDDEN_NODE & ~otp28 == 0
    # Declined: the atom cache, and bits 15, 20 and 21, which ask for nothing that we send.
    assert _bits(otp28 & ~HIDDEN_NODE) == [1 << 13, 1 << 20]


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (b"\0\0", "of 0 bytes"),
        (b"\xff\xff", "of 65535 bytes"),
        (frame(b"n\0\5\0\0\0\0a@b"), "version 5"),
        (frame(b"GET / HTTP/1.1"), "name expected"),
        (frame(b"N"), "bad handshake message"),
        (frame(hello(size=500)), "cut short"),
        (frame(hello(b"")), "cut short"),
        (frame(hello(b"\xff\xfe@b")), "not UTF-8"),
        (frame(hello(b"noat")), "no node name"),
        (frame(hello(b"@b")), "no node name"),
        (frame(hello(b"a@b@c")), "no node name"),
        (frame(hello(b"a\n@b")), "no node name"),
        (frame(hello(b"a" * 256 + b"@b")), "258 characters"),
        (frame(hello()) + frame(b"x"), "bad handshake message"),
        (frame(hello()) + frame(b"r" + bytes(10)), "bad handshake message"),
        (frame(hello()) + frame(b"x" + bytes(20)), "challenge reply expected"),
        (frame(hello()) + frame(b"r" + bytes(20)), "cookies differ"),
    ],
)
def test_bad_callers_are_refused(stream: bytes, match: str) -> None:
    acceptor = Acceptor(B, decide=accept)
    with pytest.raises(HandshakeError, match=match):
        acceptor.receive(stream)
    with pytest.raises(HandshakeError, match="over"):
        acceptor.receive(b"more")
    assert acceptor.established is None


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (frame(b"x"), "status expected"),
        (frame(b"s"), "answers"),
        (frame(b"sdont_know"), "answers dont_know"),
        (frame(b"snamed:\0\3u@h\0\0\0\1"), "answers named"),  # nobody asked for one
        (frame(b"sok") + frame(b"N"), "bad handshake message"),
        (frame(b"sok") + frame(b"M" + challenge()[1:]), "challenge expected"),
        (frame(b"sok") + frame(challenge(b"c@127.0.0.1")), "where b@127.0.0.1 was called"),
        (frame(b"sok") + frame(challenge()[:-3]), "cut short"),
        (frame(b"sok") + frame(challenge()) + frame(b"a"), "bad handshake message"),
        (frame(b"sok") + frame(challenge()) + frame(b"b" + bytes(16)), "ack expected"),
    ],
)
def test_bad_answers_are_refused(stream: bytes, match: str) -> None:
    initiator = Initiator(A, B.name)
    with pytest.raises(HandshakeError, match=match):
        initiator.receive(stream)


@pytest.mark.parametrize("tail", [b"", b"\0\3u@h", b"\0\x09u@h\0\0\0\1", b"\0\0\0\0\0\1"])
def test_a_given_name_cut_short_is_refused(tail: bytes) -> None:
    nameless = Local("127.0.0.1", "secret", 0, HIDDEN_NODE | Flag.NAME_ME)
    with pytest.raises(HandshakeError):
        Initiator(nameless, B.name).receive(frame(b"snamed:" + tail))


def test_what_follows_the_handshake_is_kept() -> None:
    initiator, acceptor = Initiator(A, B.name), Acceptor(B, decide=accept)
    acceptor.receive(initiator.data_to_send())
    initiator.receive(acceptor.data_to_send())
    acceptor.receive(initiator.data_to_send())
    initiator.receive(acceptor.data_to_send() + b"\0\0\0\0first packets")
    assert initiator.established is not None
    assert initiator.established.rest == b"\0\0\0\0first packets"
    with pytest.raises(HandshakeError, match="over"):
        initiator.receive(b"x")


@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_raise_nothing_but_handshake_errors(data: bytes, framed: bool) -> None:
    machines: list[Callable[[], Acceptor | Initiator]] = [
        lambda: Acceptor(B, decide=accept),
        lambda: Initiator(A, B.name),
    ]
    for make in machines:
        machine = make()
        try:
            machine.receive(frame(data) if framed else data)
        except HandshakeError:
            assert machine.established is None


def test_mutated_handshakes_never_succeed_with_a_wrong_digest() -> None:
    chance = random.Random(3)
    for _ in range(2000):
        initiator, acceptor = Initiator(A, B.name), Acceptor(B, decide=accept)
        try:
            acceptor.receive(initiator.data_to_send())
            initiator.receive(acceptor.data_to_send())
            reply = bytearray(initiator.data_to_send())
            reply[chance.randrange(7, len(reply))] ^= 1 << chance.randrange(8)
            acceptor.receive(bytes(reply))
        except HandshakeError:
            continue
        raise AssertionError("a changed digest was taken")


async def streams() -> tuple[
    asyncio.Server,
    tuple[asyncio.StreamReader, asyncio.StreamWriter],
    tuple[asyncio.StreamReader, asyncio.StreamWriter],
]:
    """Both ends of one TCP connection."""
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
        asyncio.get_running_loop().create_future()
    )
    server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
    near = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    return server, near, await accepted


async def test_over_sockets_both_sides_end_and_refusals_arrive() -> None:
    server, near, far = await streams()
    async with server:
        here, there = await asyncio.gather(
            perform(Initiator(A, B.name), *near), perform(Acceptor(B, decide=accept), *far)
        )
        assert (here.peer_name, there.peer_name) == (B.name, A.name)
        near[1].close()
        far[1].close()
    server, near, far = await streams()
    async with server:
        outcomes = await asyncio.gather(
            perform(Initiator(A, B.name), *near),
            perform(Acceptor(B, decide=lambda _: Status.NOK), *far),
            return_exceptions=True,
        )
        assert "answers nok" in str(outcomes[0])
        assert "was answered nok" in str(outcomes[1])
        near[1].close()
        far[1].close()


async def test_a_silent_or_vanished_peer_ends_the_handshake() -> None:
    server, near, far = await streams()
    async with server:
        near[1].write(b"\0")  # a slow loris: one byte, then nothing
        with pytest.raises(HandshakeError, match=r"within 0.05 s"):
            await perform(Acceptor(B, decide=accept), *far, timeout_s=0.05)
        near[1].close()
        with pytest.raises(HandshakeError, match=r"closed the connection|connection lost"):
            await perform(Acceptor(B, decide=accept), *far)
        far[1].close()
