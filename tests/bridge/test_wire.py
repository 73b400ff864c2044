"""Packets of a link: recorded ones, round trips in every variant, bounds, hostile bytes."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import common_packets, etf
from bridge.control_codec import NO_PAYLOAD, to_control
from bridge.control_messages import (
    Demonitor,
    ExitSignal,
    GroupLeader,
    Link,
    LinkExit,
    Message,
    Monitor,
    MonitorDown,
    Send,
    SendAlias,
    SendName,
    SpawnReply,
    SpawnRequest,
    Tick,
    Unlink,
    UnlinkAck,
)
from bridge.errors import DecodeError, EncodeError, ProtocolError
from bridge.etf import decode_term, encode_term
from bridge.flags import HIDDEN_NODE, MANDATORY, VISIBLE_NODE, Flag
from bridge.fragments import FRAGMENT_BYTES
from bridge.term import Atom, Pid, Ref, Term
from bridge.wire import TICK, Decoder, Encoder, Event
from tests.bridge.golden.record_link import ALIAS, FLAGS, PID, load
from tests.bridge.terms import pids, plain_atoms, refs, terms

RECORDED = load()
RUNS = pytest.mark.parametrize("run", RECORDED)
HELLO = Atom("hello")


def framed(packet: bytes) -> bytes:
    return struct.pack(">I", len(packet)) + packet


def events_of(run: str) -> dict[str, list[Event]]:
    """What the packets of each step mean, without the marker that ends it."""
    decoder = Decoder(FLAGS[run.partition("-")[2]])
    return {
        name: [event for packet in packets for event in decoder.feed(framed(packet))][:-1]
        for name, packets in RECORDED[run].items()
    }


@RUNS
def test_recorded_packets_mean_what_the_stock_node_did(run: str) -> None:
    found = events_of(run)
    me = found["send"][0].sender  # type: ignore[union-attr]  # checked with the rest, below
    assert isinstance(me, Pid)
    world = (HELLO, Atom("world"))
    assert found["send_name"] == [
        SendName(me, Atom("reg"), (HELLO, True, Atom("world"), HELLO, Atom("undefined")))
    ]
    assert found["send"] == [Send(me, PID, (*world, Atom("b\u00e5t"), me))]
    assert found["send_traced"] == [Send(me, PID, HELLO)]
    assert found["send_fragments"] == [Send(me, PID, (*world, bytes([7]) * 150_000))]
    assert found["send_alias"] == [SendAlias(me, ALIAS, (HELLO, ALIAS))]
    assert found["link"] == [Link(me, PID)]
    (unlink,) = found["unlink"]
    assert isinstance(unlink, Unlink)
    assert unlink == Unlink(unlink.id, me, PID)
    assert unlink.id > 0
    (monitor,) = found["monitor"]
    assert isinstance(monitor, Monitor)
    assert monitor == Monitor(me, PID, monitor.ref)
    assert found["demonitor"] == [Demonitor(me, PID, monitor.ref)]
    (by_name,) = found["monitor_name"]
    assert isinstance(by_name, Monitor)
    assert by_name == Monitor(me, Atom("reg"), by_name.ref)
    assert found["exit"] == [ExitSignal(me, PID, (HELLO, [1, 2]))]
    link, link_exit = found["link_exit"]
    assert isinstance(link, Link)
    assert link_exit == LinkExit(link.sender, PID, (Atom("bye"), PID))
    (spawn,) = found["spawn"]
    assert isinstance(spawn, SpawnRequest)
    assert (spawn.sender, spawn.module, spawn.function) == (me, "mod", "func")
    assert (spawn.arguments, spawn.options) == ([1, HELLO], [Atom("link"), Atom("monitor")])
    assert found["group_leader"] == [GroupLeader(me, PID)]
    if run.startswith("otp28"):
        assert found["send_priority"] == [SendAlias(me, ALIAS, HELLO, priority=True)]
        assert found["exit_priority"] == [ExitSignal(me, ALIAS, HELLO, priority=True)]


@pytest.mark.parametrize("run", [run for run in RECORDED if run.endswith("ours")])
def test_our_packets_are_the_stock_nodes_own(run: str) -> None:
    flags = FLAGS["ours"]
    if run.startswith("otp25"):
        flags &= ~Flag.ALTACT_SIG  # came with OTP 28
    encoder = Encoder(flags)
    for name, events in events_of(run).items():
        if name in ("send_traced", "send_fragments"):
            continue  # we send no trace tokens, and cut elsewhere
        packets = [encoder.encode(event) for event in events if not isinstance(event, Tick)]
        assert packets == [[framed(packet)] for packet in RECORDED[run][name][:-1]], name


words = st.integers(0, 2**64 - 1)
processes_or_names = st.one_of(pids, plain_atoms)
flag_choices = st.sampled_from(
    [
        VISIBLE_NODE,
        HIDDEN_NODE & ~Flag.ALTACT_SIG,
        MANDATORY,
        MANDATORY | int(Flag.FRAGMENTS),
        VISIBLE_NODE & ~int(Flag.FRAGMENTS),
        VISIBLE_NODE & ~int(Flag.EXIT_PAYLOAD),
    ]
)


def messages(payload: st.SearchStrategy[Term]) -> st.SearchStrategy[Message]:
    return st.one_of(
        st.builds(Send, pids, pids, payload),
        st.builds(SendName, pids, plain_atoms, payload),
        st.builds(SendAlias, pids, refs, payload),
        st.builds(Link, pids, pids),
        st.builds(Unlink, words, pids, pids),
        st.builds(UnlinkAck, words, pids, pids),
        st.builds(LinkExit, pids, pids, payload),
        st.builds(ExitSignal, pids, pids, payload),
        st.builds(Monitor, pids, processes_or_names, refs),
        st.builds(Demonitor, pids, processes_or_names, refs),
        st.builds(MonitorDown, processes_or_names, pids, refs, payload),
        st.builds(
            SpawnRequest,
            *(refs, pids, pids, plain_atoms, plain_atoms, st.lists(payload, max_size=3), payload),
        ),
        st.builds(SpawnReply, refs, pids, st.booleans(), st.booleans(), processes_or_names),
        st.builds(GroupLeader, pids, pids),
    )


@given(flag_choices, st.lists(messages(terms), max_size=5), st.randoms(use_true_random=False))
def test_messages_survive_in_every_variant_however_they_are_cut(
    flags: int, sent: list[Message], chance: random.Random
) -> None:
    encoder, decoder = Encoder(flags), Decoder(flags)
    stream = b"".join(b"".join(encoder.encode(message)) + TICK for message in sent)
    found: list[Event] = []
    pos = 0
    while pos < len(stream):
        size = chance.choice((1, 3, 7, 50, 1000))
        found += decoder.feed(stream[pos : pos + size])
        pos += size
    assert found[1::2] == [Tick()] * len(sent)
    for event, message in zip(found[0::2], sent, strict=True):
        if isinstance(message, Send) and not flags & Flag.SEND_SENDER:
            message = Send(None, message.to, message.message)
        assert repr(event) == repr(message)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 400_000), min_size=1, max_size=4), st.randoms())
def test_fragments_of_several_senders_may_interleave(
    sizes: list[int], chance: random.Random
) -> None:
    encoder, decoder = Encoder(VISIBLE_NODE), Decoder(VISIBLE_NODE)
    sent = [Send(Pid("a@b", n, 0, 1), PID, bytes([n]) * size) for n, size in enumerate(sizes)]
    queues = [encoder.encode(message) for message in sent]
    assert all(len(packet) < FRAGMENT_BYTES + 200 for queue in queues for packet in queue)
    found: list[Event] = []
    while any(queues):
        queue = chance.choice([queue for queue in queues if queue])
        found += decoder.feed(queue.pop(0))
    assert sorted(found, key=lambda event: event.sender.id) == sent  # type: ignore[union-attr]


def test_a_fragmented_message_follows_otps_layout() -> None:
    packets = Encoder(VISIBLE_NODE).encode(Send(PID, PID, bytes(2 * FRAGMENT_BYTES)))
    assert [packet[4:6] for packet in packets] == [b"\x83E", b"\x83F", b"\x83F"]
    ids = [struct.unpack(">QQ", packet[6:22]) for packet in packets]
    assert ids == [(1, 3), (1, 2), (1, 1)]


def test_a_term_that_cannot_be_sent_writes_nothing() -> None:
    with pytest.raises(EncodeError):
        Encoder(VISIBLE_NODE).encode(Send(PID, PID, object()))


CONTROL_SEND = etf.encode_term((22, PID, PID))


def fragment(sequence: int, number: int, body: bytes, *, first: bool = False) -> bytes:
    head = b"\x83E" if first else b"\x83F"
    control = b"\0" + CONTROL_SEND if first else b""
    return framed(head + struct.pack(">QQ", sequence, number) + control + body)


WHOLE = b"\x83D\0"


def control_of(*elements: Term) -> bytes:
    return framed(WHOLE + etf.encode_term(elements))


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (framed(b"p\x83h\0"), "not what was agreed"),
        (framed(b"\x83"), "not what was agreed"),
        (framed(b"junk"), "not what was agreed"),
        (b"\xff\xff\xff\xff", "limit is"),
        (framed(WHOLE + b"a\1"), "no tuple"),
        (framed(WHOLE + b"h\0"), "no tuple"),
        (control_of(1, PID), "control message 1 of 2"),
        (control_of(1, PID, PID, PID), "control message 1 of 4"),
        (control_of(99, PID, PID), "control message 99"),
        (control_of(4, PID, PID), "control message 4"),
        (control_of(2**70, PID, PID), "control message"),
        (control_of(1, PID, Atom("name")), "with Pid, Atom"),
        (control_of(35, -1, PID, PID), "with int, Pid, Pid"),
        (control_of(19, PID, 5, ALIAS), "with Pid, int, Ref"),
        (control_of(31, ALIAS, PID, 0, b"x"), "with Ref, Pid, int, bytes"),
        (framed(WHOLE + etf.encode_term((1, PID, PID)) + b"a\1"), "bytes after control 1"),
        (framed(WHOLE + CONTROL_SEND + b"a\1a\1"), "bytes after the message"),
        (framed(WHOLE + etf.encode_term((22, PID, Atom("x"))) + b"a\1"), "with Pid, Atom"),
        (framed(WHOLE + etf.encode_term((13, PID, PID, 1))), "control message 3"),
        (framed(WHOLE + etf.encode_term((37, 4, PID, PID)) + b"j"), "control message 37"),
        (framed(WHOLE + etf.encode_term((37, 4)) + b"j"), "control message 37"),
        (framed(b"\x83D"), "header cut short"),
        (framed(b"\x83D\1\x08"), "header cut short"),
        (framed(b"\x83D\1\x08\0\5ab"), "header cut short"),
        (framed(b"\x83D\1\x00\7"), "never sent"),
        (framed(b"\x83D\1\x08\0\2\xff\xff"), "not UTF-8"),
        (framed(b"\x83E\0\0"), "fragment cut short"),
        (fragment(1, 5, b"x"), "out of order"),
        (fragment(1, 3, b"x", first=True) + fragment(1, 1, b"x"), "out of order"),
        (fragment(1, 3, b"x", first=True) + fragment(2, 2, b"x"), "out of order"),
        (fragment(1, 3, b"x", first=True) * 2, "started twice"),
        (fragment(1, 0, b"x", first=True), "in 0 fragments"),
        (
            framed(b"\x83E" + struct.pack(">QQ", 1, 2) + b"\0" + etf.encode_term((1, PID, PID))),
            "control 1 in 2 fragments",
        ),
    ],
)
def test_broken_packets_are_refused(stream: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        Decoder(VISIBLE_NODE).feed(stream)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"a",
        b"\xff",
        b"m\xff\xff\xff\xff",
        b"h\1" * 5000 + b"j",
        b"\x83a\1",
    ],
)
def test_undecodable_messages_are_refused(body: bytes) -> None:
    with pytest.raises(DecodeError):
        Decoder(VISIBLE_NODE).feed(framed(WHOLE + CONTROL_SEND + body))


def test_a_spawn_request_must_carry_as_many_arguments_as_it_says() -> None:
    control = etf.encode_term((29, ALIAS, PID, PID, (Atom("m"), Atom("f"), 2), []))
    with pytest.raises(ProtocolError, match="29"):
        Decoder(VISIBLE_NODE).feed(framed(WHOLE + control + etf.encode_term([1])))
    with pytest.raises(ProtocolError, match="29"):
        Decoder(VISIBLE_NODE).feed(framed(WHOLE + control + etf.encode_term(Atom("no"))))


def test_the_pass_through_form_is_read_only_where_it_was_agreed() -> None:
    flags = MANDATORY
    body = b"p\x83" + CONTROL_SEND
    assert Decoder(flags).feed(framed(body + b"\x83a\1")) == [Send(PID, PID, 1)]
    with pytest.raises(ProtocolError, match="version byte"):
        Decoder(flags).feed(framed(body + b"a\1"))
    with pytest.raises(ProtocolError, match="agreed"):
        Decoder(flags).feed(framed(WHOLE + CONTROL_SEND + b"a\1"))


def test_an_announced_packet_costs_nothing_until_it_comes() -> None:
    decoder = Decoder(VISIBLE_NODE)
    tracemalloc.start()
    try:
        assert decoder.feed(struct.pack(">I", 200 << 20) + b"x" * 1000) == []
        for _ in range(50):
            assert decoder.feed(b"x" * 1000) == []
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 400_000


def test_unfinished_fragments_are_bounded_in_number_and_bytes() -> None:
    decoder = Decoder(VISIBLE_NODE, max_sequences=10)
    for sequence in range(10):
        assert decoder.feed(fragment(sequence, 2**63, b"x", first=True)) == []
    with pytest.raises(ProtocolError, match="more than 10"):
        decoder.feed(fragment(10, 2, b"x", first=True))

    decoder = Decoder(VISIBLE_NODE, max_message_bytes=5000)
    decoder.feed(fragment(1, 9, b"x" * 2000, first=True))
    decoder.feed(fragment(2, 9, b"x" * 2000, first=True))
    with pytest.raises(ProtocolError, match="more than 5000 bytes"):
        decoder.feed(fragment(1, 8, b"x" * 2000))

    decoder = Decoder(VISIBLE_NODE)
    decoder.feed(fragment(1, 2**40, b"x", first=True))
    tracemalloc.start()
    try:
        for number in range(2**40 - 1, 2**40 - 20_000, -1):
            decoder.feed(fragment(1, number, b""))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000


def test_finished_fragments_give_their_bytes_back() -> None:
    decoder = Decoder(VISIBLE_NODE, max_message_bytes=200_000)
    encoder = Encoder(VISIBLE_NODE)
    for _ in range(10):
        events = [e for packet in encoder.encode(Send(PID, PID, bytes(150_000)))
                  for e in decoder.feed(packet)]  # fmt: skip
        assert events == [Send(PID, PID, bytes(150_000))]


def _mutate(data: bytes, chance: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        pos = chance.randrange(4, len(broken))
        match chance.randrange(3):
            case 0:
                broken[pos] = chance.randrange(256)
            case 1:
                del broken[pos : pos + chance.randint(1, 4)]
            case _:
                broken[pos:pos] = chance.randbytes(chance.randint(1, 4))
    broken[:4] = struct.pack(">I", len(broken) - 4)
    return bytes(broken)


@pytest.mark.slow
@RUNS
def test_mutated_packets_raise_nothing_but_what_is_promised(run: str) -> None:
    chance = random.Random(7)
    flags = FLAGS[run.partition("-")[2]]
    steps = [found for name, found in RECORDED[run].items() if name != "send_fragments"]
    packets = [framed(packet) for found in steps for packet in found]
    outcomes = {True: 0, False: 0}
    for _ in range(2500):
        decoder = Decoder(flags)
        num_good = chance.randrange(len(packets))  # the atom cache needs what came before
        decoder.feed(b"".join(packets[:num_good]))
        try:
            decoder.feed(_mutate(packets[num_good], chance))
        except (ProtocolError, DecodeError):
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 0


@given(st.binary(max_size=100))
def test_random_packets(data: bytes) -> None:
    for stream in (data, framed(data), framed(WHOLE + data), framed(b"\x83E" + data)):
        try:
            Decoder(VISIBLE_NODE).feed(stream)
        except (ProtocolError, DecodeError):
            continue


def test_references_and_names_that_are_booleans_stay_atoms() -> None:
    true = Atom("true")
    sent = SendName(PID, true, 1)
    (found,) = Decoder(VISIBLE_NODE).feed(b"".join(Encoder(VISIBLE_NODE).encode(sent)))
    assert found == sent
    assert type(found.to) is Atom
    reply = SpawnReply(Ref("a@b", 1, (1,)), PID, False, True, PID)
    (found,) = Decoder(VISIBLE_NODE).feed(b"".join(Encoder(VISIBLE_NODE).encode(reply)))
    assert found == reply


@settings(max_examples=200)
@given(
    sender=pids,
    to=pids,
    alias=refs,
    name=plain_atoms,
    term=terms,
    variant=st.sampled_from(
        [VISIBLE_NODE, VISIBLE_NODE & ~int(Flag.ALTACT_SIG), VISIBLE_NODE & ~int(Flag.SEND_SENDER)]
    ),
)
def test_the_short_way_of_common_packets_is_the_general_one(
    sender: Pid, to: Pid, alias: Ref, name: Atom, term: Term, variant: int
) -> None:
    messages: list[Message] = [
        Send(sender, to, term),
        SendName(sender, name, term),
        SendAlias(sender, alias, term),
        Monitor(sender, to, alias),
        Monitor(sender, name, alias),
        Demonitor(sender, to, alias),
    ]
    for message in messages:
        control, payload = to_control(message, variant)
        general = encode_term(control, b"\x83D\0")
        short = common_packets.control(message, variant)
        assert short is None or short == general
        packet = general if payload is NO_PAYLOAD else encode_term(payload, general)
        decode_term(packet, 3)  # now all in it has been seen
        found = common_packets.read(packet)
        names = {sender.node, to.node, alias.node, name}
        if variant == VISIBLE_NODE and all(len(one.encode()) < 256 for one in names):
            assert found == message or names & {"true", "false"}
        else:
            assert found in (None, message)
        for cut in range(len(general)):
            with contextlib.suppress(DecodeError):
                assert common_packets.read(packet[:cut]) is None
