"""The live port under attack: a real node, real sockets, peers that do everything wrong.

What must hold after each attack: the node serves its honest peers, no stranger's byte has reached
a mailbox, and nothing grew that the attacker can make grow for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest

from bridge import epmd, etf_decode, etf_encode, gen_server
from bridge.control_messages import Message, Send, SendName
from bridge.epmd import Epmd
from bridge.errors import HandshakeError
from bridge.etf import encode_term
from bridge.flags import VISIBLE_NODE
from bridge.fragments import FIRST, FRAGMENT_BYTES, IDS, NEXT
from bridge.gen_server import GenServer
from bridge.handshake import SETUP_TIMEOUT_S, Initiator, Local
from bridge.handshake_io import perform
from bridge.net_kernel import MAX_HANDSHAKES
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.wire import MAX_MESSAGE_BYTES, MAX_SEQUENCES, Encoder
from tests.otp.stock import free_tcp_port
from tests.waiting import wait_until_async

HOST = "127.0.0.1"
HERE, GOOD, RAW = (Atom(f"{name}@{HOST}") for name in ("here", "good", "raw"))
COOKIE = "cookie"
WAIT_S = 10.0
HEADER = b"\x83D\0"  # of a whole packet with an empty atom table
ME = Pid(RAW, 1, 0, 7)
CHANCE = 20_260_101


class Echo(GenServer):
    async def handle_call(self, request: Term, from_: Term) -> Term:
        return request


class Victim:
    """A node with an honest peer and a process ``witness`` that keeps all that it gets."""

    def __init__(self, node: Node, good: Node) -> None:
        self.node = node
        self._good = good
        self.seen: list[Term] = []
        self.asked = 0
        self._witness = node.spawn(self._keep, name="witness")

    async def _keep(self, me: Process) -> None:
        while True:
            self.seen.append(await me.receive())

    @property
    def address(self) -> tuple[str, int]:
        assert self.node.address is not None
        return self.node.address

    @property
    def handshakes(self) -> int:
        assert self.node._kernel is not None
        return len(self.node._kernel._handshakes)

    @property
    def peers(self) -> set[str]:
        """All names that the node keeps anything of."""
        assert self.node._kernel is not None
        return set(self.node._kernel._states)

    async def serves(self) -> None:
        """Its honest peer, over the link it has had all the time, and a newcomer."""
        self.asked += 1
        with self._good.open_process() as me:
            assert await gen_server.call(me, ("echo", HERE), self.asked, timeout_s=WAIT_S) == (
                self.asked
            )
        assert self.node.nodes() == [GOOD]
        assert self.node.whereis("witness") == self._witness


@contextlib.asynccontextmanager
async def victim(epmd_of: Epmd | None = None) -> AsyncIterator[Victim]:
    node, good = Node(HERE, COOKIE), Node(GOOD, COOKIE)
    try:
        await node.start(listen=(HOST, 0), epmd=epmd_of)
        await gen_server.start(node, Echo(), name="echo")
        await good.start(listen=None, epmd=None)
        assert await good.connect(HERE, address=node.address, timeout_s=WAIT_S)
        found = Victim(node, good)
        await found.serves()
        yield found
        await wait_until_async(lambda: node.nodes() == [GOOD], WAIT_S)
        await found.serves()
        await wait_until_async(lambda: found.handshakes == 0, WAIT_S)
        await wait_until_async(lambda: found.peers == {GOOD}, WAIT_S)
    finally:
        await good.stop()
        await node.stop()


class Attacker:
    """A connection that sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.encoder = Encoder(int(VISIBLE_NODE))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def send_packet(self, packet: bytes) -> None:
        self.writer.write(struct.pack(">I", len(packet)) + packet)

    def send_message(self, message: Message) -> None:
        for packet in self.encoder.encode(message):
            self.writer.write(packet)

    async def closed(self, timeout_s: float = WAIT_S) -> None:
        """Wait for the node to close the connection."""
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1 << 16):
                    pass

    def close(self) -> None:
        self.writer.close()


@contextlib.asynccontextmanager
async def stranger(target: Victim) -> AsyncIterator[Attacker]:
    """Knows nothing but the port."""
    attacker = Attacker(*await asyncio.open_connection(*target.address))
    try:
        yield attacker
    finally:
        attacker.close()


@contextlib.asynccontextmanager
async def insider(target: Victim) -> AsyncIterator[Attacker]:
    """Knows the cookie, and has a link."""
    async with stranger(target) as attacker:
        local = Local(RAW, COOKIE, 7, VISIBLE_NODE)
        await perform(Initiator(local, HERE), attacker.reader, attacker.writer)
        yield attacker
        await wait_until_async(lambda: RAW not in target.node.nodes(), WAIT_S)


@contextlib.contextmanager
def memory_grows_by_less_than(limit_bytes: int) -> Iterator[None]:
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    grown = process.memory_info().rss - before
    assert grown < limit_bytes, f"{grown} bytes more"


# --- before authentication


def first_frames(chance: random.Random) -> Iterator[bytes]:
    """What a stranger may begin with: noise, and a right beginning gone wrong."""
    good = Initiator(Local(RAW, COOKIE, 7, VISIBLE_NODE), HERE).data_to_send()
    for _ in range(150):
        yield chance.randbytes(chance.randrange(1, 3000))
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        yield bytes(bad)
    yield b"\xff\xff" + b"x" * 70_000  # an endless first message
    yield b"\0\0"
    yield b"GET / HTTP/1.1\r\n\r\n"
    yield b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(500)  # a TLS hello


@pytest.mark.slow
async def test_noise_instead_of_a_handshake() -> None:
    async with victim() as target:
        for data in first_frames(random.Random(CHANCE)):
            async with stranger(target) as attacker:
                attacker.send(data)
                with contextlib.suppress(OSError):  # closed already
                    attacker.writer.write_eof()
                await attacker.closed()
        assert target.seen == []


@pytest.mark.slow
async def test_silent_and_slow_handshakes_are_closed_in_time_and_bounded_in_number() -> None:
    loop = asyncio.get_running_loop()
    good = Initiator(Local(RAW, COOKIE, 7, VISIBLE_NODE), HERE).data_to_send()
    async with victim() as target, contextlib.AsyncExitStack() as stack:
        start_s = loop.time()

        async def slow(data: bytes) -> float:
            attacker = await stack.enter_async_context(stranger(target))
            attacker.send(data)
            await attacker.closed()
            return loop.time() - start_s

        waits = [asyncio.create_task(slow(data)) for data in (b"", b"\0", good[:9], good)]
        await wait_until_async(lambda: target.handshakes == len(waits), WAIT_S)
        await target.serves()
        for waited_s in await asyncio.gather(*waits):
            assert SETUP_TIMEOUT_S - 0.5 < waited_s < SETUP_TIMEOUT_S + 1.0

        crowd = [await stack.enter_async_context(stranger(target)) for _ in range(MAX_HANDSHAKES)]
        await wait_until_async(lambda: target.handshakes == MAX_HANDSHAKES, WAIT_S)
        late = [await stack.enter_async_context(stranger(target)) for _ in range(20)]
        for attacker in crowd[:20]:  # the oldest give way
            await attacker.closed()
        assert target.handshakes == MAX_HANDSHAKES
        await target.serves()
        for attacker in (*crowd, *late):
            attacker.close()
        await wait_until_async(lambda: target.handshakes == 0, WAIT_S)


@pytest.mark.slow
async def test_nothing_gets_in_without_the_cookie() -> None:
    """Messages before, behind and instead of a right digest reach no mailbox."""
    encoder = Encoder(int(VISIBLE_NODE))
    (letter,) = encoder.encode(SendName(ME, Atom("witness"), Atom("let me in")))
    async with victim() as target:
        async with stranger(target) as attacker:
            attacker.send(letter)
            await attacker.closed()
        for number in range(100):  # every time under another name
            machine = Initiator(
                Local(f"raw{number}@{HOST}", "another cookie", 7, VISIBLE_NODE), HERE
            )
            async with stranger(target) as attacker:
                attacker.send(machine.data_to_send())
                if number % 3 == 0:
                    attacker.send(letter)  # before the challenge is answered
                else:
                    with contextlib.suppress(HandshakeError):
                        while not (digest := machine.data_to_send()):
                            machine.receive(await attacker.reader.read(4096))
                        attacker.send(digest + letter * (number % 3))
                await attacker.closed()
        assert target.seen == []


@pytest.mark.slow
async def test_the_port_mapper_stands_abuse_and_goes_on() -> None:
    chance = random.Random(CHANCE)
    mapper = Epmd(HOST, free_tcp_port())
    async with victim(mapper) as target:
        assert mapper.serving

        async def abuse(data: bytes, *, finish: bool) -> None:
            reader, writer = await asyncio.open_connection(HOST, mapper.tcp_port)
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                if finish:
                    writer.write_eof()
                async with asyncio.timeout(WAIT_S):
                    while await reader.read(4096):
                        pass
            writer.close()

        for _ in range(200):
            await abuse(chance.randbytes(chance.randrange(1, 200)), finish=True)
        with memory_grows_by_less_than(30 << 20):
            # The longest request there can be, and requests that never end, many at once.
            await asyncio.gather(
                *(abuse(b"\xff\xff" + bytes(200_000), finish=False) for _ in range(50)),
                *(abuse(b"\0\xff\x78", finish=False) for _ in range(50)),
            )
        assert await epmd.names(HOST, mapper.tcp_port) == [("here", target.address[1])]


# --- after authentication


def garbage() -> dict[str, bytes]:
    """Packets that must each cost their sender the link, and nothing more."""
    pid = encode_term(ME)
    send = HEADER + b"h\x03a\x16" + pid + pid
    return {
        "empty header": HEADER,
        "another packet type": b"\x83\x99abc",
        "no version": b"abc",
        "control is no tuple": HEADER + b"a\x01",
        "unknown operation": HEADER + encode_term((99, ME, ME)),
        "operation of wrong size": HEADER + encode_term((22, ME)),
        "operation is huge": HEADER + encode_term((1 << 4000, ME, ME)),
        "wrong types": HEADER + encode_term((1, b"pid", [])),
        "message is missing": send,
        "message is cut short": send + b"m\0\0\0\x09abc",
        "bytes after the message": send + b"jj",
        "unknown tag": send + b"\x01",
        "binary of 4 GB": send + b"m\xff\xff\xff\xff",
        "list of 4 G elements": send + b"l\xff\xff\xff\xff" + b"j" * 100,
        "tuple of 4 G elements": send + b"i\xff\xff\xff\xff" + b"j" * 100,
        "map of 4 G pairs": send + b"t\xff\xff\xff\xff" + b"j" * 100,
        "integer of 4 GB": send + b"o\xff\xff\xff\xff\0abc",
        "lists nested 100,000 deep": send + b"l\0\0\0\x01" * 100_000 + b"j" * 100_001,
        "tuples nested 100,000 deep": send + b"h\x01" * 100_000 + b"j",
        "maps nested 100,000 deep": send + b"t\0\0\0\x01j" * 100_000 + b"j",
        "atom of 300 characters": send + b"v\x01\x2c" + b"x" * 300,
        "atom of 65535 characters": send + b"v\xff\xff" + b"x" * 65535,
        "atom that is no UTF-8": send + b"w\x02\xff\xfe",
        "atom table without atoms": b"\x83D\xff" + bytes(200),
        "reference to no table": send + b"R\x05",
        "float that is no number": send + b"F\x7f\xf8\0\0\0\0\0\0",
        "compressed bomb": send + b"\x83P\xff\xff\xff\xff" + bytes(50),
        "arguments that are not there": HEADER
        + encode_term((29, Ref(RAW, 7, (1,)), ME, ME, (Atom("a"), Atom("b"), 255), []))
        + b"j",
        "fragment of nothing": NEXT + IDS.pack(1, 1) + b"abc",
        "first fragment is cut short": FIRST + b"\0",
        "control split over fragments": FIRST + IDS.pack(1, 2) + b"\0h\x03a\x16",
        "fragment number zero": FIRST + IDS.pack(1, 0) + send[2:] + b"j",
    }


GARBAGE = garbage()


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_closes_its_own_link_alone(what: str) -> None:
    async with victim() as target:
        with memory_grows_by_less_than(30 << 20):
            async with insider(target) as attacker:
                attacker.send_message(SendName(ME, Atom("witness"), Atom("before")))
                await attacker.writer.drain()
                await wait_until_async(lambda: target.seen == ["before"], WAIT_S)
                attacker.send_packet(GARBAGE[what])
                attacker.send_message(SendName(ME, Atom("witness"), Atom("after")))
                await attacker.closed()
        assert target.seen == ["before"]


async def test_lengths_cost_nothing() -> None:
    async with victim() as target:
        with memory_grows_by_less_than(20 << 20):
            for size in (0xFFFF_FFFF, MAX_MESSAGE_BYTES + 1):
                async with insider(target) as attacker:
                    attacker.send(struct.pack(">I", size) + HEADER)
                    await attacker.closed()
            async with contextlib.AsyncExitStack() as stack:
                # As long as is allowed, and then only the beginning comes.
                attacker = await stack.enter_async_context(insider(target))
                attacker.send(struct.pack(">I", MAX_MESSAGE_BYTES) + bytes(100_000))
                await attacker.writer.drain()
                await target_is_alive(target)
                attacker.close()


async def target_is_alive(target: Victim) -> None:
    """It answers its honest peer while the attacker's link is still there."""
    with target._good.open_process() as me:
        assert await gen_server.call(me, ("echo", HERE), b"x", timeout_s=WAIT_S) == b"x"


def fragment(sequence_id: int, fragment_id: int, body: bytes, *, first: bool) -> bytes:
    control = b"\0" + encode_term((6, ME, Atom(""), Atom("witness"))) if first else b""
    return (FIRST if first else NEXT) + IDS.pack(sequence_id, fragment_id) + control + body


@pytest.mark.slow
async def test_fragments_that_never_end_are_bounded() -> None:
    async with victim() as target:
        async with insider(target) as attacker:  # too many sequences
            for number in range(MAX_SEQUENCES + 1):
                attacker.send_packet(fragment(number, 1 << 60, b"x", first=True))
            await attacker.closed()
        async with insider(target) as attacker:  # one, of empty parts, for ever
            attacker.send_packet(fragment(1, 1 << 60, b"x", first=True))
            with memory_grows_by_less_than(20 << 20):
                for number in range(1, 50_000):
                    attacker.send_packet(fragment(1, (1 << 60) - number, b"", first=False))
                await attacker.writer.drain()
                await target_is_alive(target)
            attacker.send_packet(fragment(1, 5, b"", first=False))  # out of order
            await attacker.closed()
        assert target.seen == []


async def test_interleaved_sequences_are_put_together_and_a_broken_one_ends_the_link() -> None:
    texts = [bytes([65 + number]) * (3 * FRAGMENT_BYTES) for number in range(4)]
    bodies = [encode_term(text) for text in texts]
    async with victim() as target:
        async with insider(target) as attacker:
            for part in range(4):
                for number, body in enumerate(bodies):
                    piece = body[part * FRAGMENT_BYTES : (part + 1) * FRAGMENT_BYTES]
                    attacker.send_packet(fragment(number, 4 - part, piece, first=part == 0))
            await wait_until_async(lambda: len(target.seen) == 4, WAIT_S)
            assert target.seen == texts
            attacker.send_packet(fragment(7, 3, bodies[0][:10], first=True))
            attacker.send_packet(fragment(8, 3, bodies[1][:10], first=True))
            attacker.send_packet(fragment(7, 2, b"", first=False))
            attacker.send_packet(fragment(7, 2, b"", first=False))  # twice
            await attacker.closed()
        assert len(target.seen) == 4


@pytest.mark.slow
async def test_mutated_packets_on_a_live_link() -> None:
    chance = random.Random(CHANCE)
    payload = (Atom("msg"), [1, 2.5, b"text", {Atom("k"): ME}], Ref(RAW, 7, (1, 2, 3)))
    messages: list[Message] = [SendName(ME, Atom("witness"), payload)]
    messages += [Send(ME, Pid(HERE, 1, 0, 9), payload)]
    packets = [packet for m in messages for packet in Encoder(int(VISIBLE_NODE)).encode(m)]
    async with victim() as target:
        for _ in range(150):
            async with insider(target) as attacker:
                for _ in range(20):
                    bad = bytearray(chance.choice(packets))
                    for _ in range(chance.randrange(1, 4)):
                        bad[chance.randrange(4, len(bad))] = chance.randrange(256)
                    attacker.send(bytes(bad))
                with contextlib.suppress(OSError):
                    attacker.writer.write_eof()
                await attacker.closed()


@pytest.mark.slow
async def test_names_of_strangers_are_not_kept() -> None:
    """Atoms, pids and references of a peer fill memos of a fixed size, and no table."""
    limit = etf_encode.MAX_CACHED
    async with victim() as target, insider(target) as attacker:
        with memory_grows_by_less_than(40 << 20):
            for number in range(3 * limit):
                name = Atom(f"atom_{number}_" + "x" * 200)
                term = (name, Pid(name, number, 0, 7), Ref(name, 7, (number,)))
                attacker.send_message(SendName(ME, Atom("nobody"), term))
                if number % 1000 == 0:
                    await attacker.writer.drain()
            attacker.send_message(SendName(ME, Atom("witness"), Atom("done")))
            await wait_until_async(lambda: target.seen == ["done"], WAIT_S)
        assert len(etf_decode._atoms) <= limit
        assert len(etf_decode._identifiers) <= limit
        assert len(etf_encode._atom_wires) <= limit
        attacker.close()
