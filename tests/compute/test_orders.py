"""Orders over real sockets: what arrives, who is let in, and how a lost head is noticed."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.errors import JoinRefused, PeerLost
from compute.order_door import HELLO_S
from compute.orders import (
    SILENT_S,
    OrderReceiver,
    OrderSender,
    decode_rows,
    encode_rows,
)
from compute.stage import Row

WAIT_S = 10.0
ids = st.lists(st.integers(0, 2**40), min_size=1, max_size=8).map(tuple)
pages = st.lists(st.integers(0, 1 << 20), max_size=4).map(tuple)
some_rows = st.lists(
    st.builds(
        Row,
        st.integers(0, 99),
        ids,
        st.integers(0, 1 << 20),
        st.booleans(),
        pages,
        st.integers(0, 1 << 20),
    ),
    max_size=5,
)


@given(some_rows)
def test_rows_come_back_as_they_were(rows: list[Row]) -> None:
    assert decode_rows(encode_rows(rows)[8:]) == rows


@given(st.binary(max_size=200))
def test_what_is_no_order_is_refused(body: bytes) -> None:
    try:
        decode_rows(body)
    except ValueError:
        return
    assert len(body) % 8 == 0


class Ends:
    """A head with one follower, rank 0, of a mesh of two."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        self._pool = ThreadPoolExecutor()
        self.sender = self._pool.submit(
            OrderSender.accept,
            self.listener,
            group="g",
            ranks=frozenset({0}),
            timeout_s=WAIT_S,
            send_timeout_s=WAIT_S,
        )

    def connect(self, *, group: str = "g", rank: int = 0) -> OrderReceiver:
        return OrderReceiver.connect(self.address, group=group, rank=rank, head=1, timeout_s=WAIT_S)

    def close(self) -> None:
        if self.sender.exception() is None:
            self.sender.result().close()
        self._pool.shutdown()


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.close()


def test_orders_arrive_in_order_and_nothing_comes_as_none(ends: Ends) -> None:
    receiver, sender = ends.connect(), ends.sender.result(WAIT_S)
    assert receiver.receive(timeout_s=0) is None
    orders = [[Row(slot, (slot,) * 300, 7, bool(slot % 2))] for slot in range(50)]
    for order in orders:
        sender.send(order)
    assert [receiver.receive(timeout_s=WAIT_S) for _ in orders] == orders
    receiver.close()


@pytest.mark.parametrize("wrong", [{"group": "other"}, {"rank": 1}, {"rank": 7}])
def test_a_stranger_gets_no_orders_and_disturbs_nobody(
    ends: Ends, wrong: dict[str, object]
) -> None:
    with pytest.raises(JoinRefused, match="does not take"):
        ends.connect(**wrong)  # type: ignore[arg-type]
    receiver = ends.connect()
    ends.sender.result(WAIT_S).send([Row(0, (1,), 0)])
    assert receiver.receive(timeout_s=WAIT_S) == [Row(0, (1,), 0)]
    receiver.close()


GARBAGE = [
    b"",
    b"\n",
    b"GET / HTTP/1.1\r\n",
    b"[]\n",
    b"{}\n",
    b'{"group": 1, "rank": 0}\n',
    b'{"group": "g", "rank": true}\n',
    b'{"group": "\\ud800", "rank": 0}\n',
    b"[" * 1020 + b"\n",
    b"\xff" * 5000,
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_at_the_door_is_shut_out(ends: Ends, garbage: bytes) -> None:
    with (
        socket.create_connection(ends.address, timeout=WAIT_S) as stranger,
        contextlib.suppress(OSError),  # closed with some of it unread
    ):
        stranger.sendall(garbage)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) in (b"", b"no\n")
    receiver = ends.connect()
    assert ends.sender.result(WAIT_S) is not None
    receiver.close()


def test_callers_that_say_nothing_keep_nobody_waiting(ends: Ends) -> None:
    quiet = [socket.create_connection(ends.address, timeout=WAIT_S) for _ in range(300)]
    quiet[0].sendall(b"{")  # and one that is slow
    receiver = ends.connect()
    assert ends.sender.result(HELLO_S) is not None  # sooner than one of them is given up
    for stranger in quiet:
        stranger.close()
    receiver.close()


def test_a_closed_head_is_lost_at_once(ends: Ends) -> None:
    receiver, sender = ends.connect(), ends.sender.result(WAIT_S)
    threading.Timer(0, sender.close).start()
    with pytest.raises(PeerLost, match="rank 1 is lost: it closed"):
        receiver.receive(timeout_s=WAIT_S)
    receiver.close()


def test_a_head_that_ends_at_its_door_is_lost_not_unwilling() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        called = pool.submit(
            OrderReceiver.connect,
            listener.getsockname(),
            group="g",
            rank=0,
            head=1,
            timeout_s=WAIT_S,
        )
        listener.accept()[0].close()
        with pytest.raises(PeerLost, match="rank 1 is lost: it"):
            called.result(WAIT_S)


def test_a_follower_that_left_costs_the_others_no_tick() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    with ThreadPoolExecutor() as pool:
        accepted = pool.submit(
            OrderSender.accept,
            listener,
            group="g",
            ranks=frozenset({0, 1}),
            timeout_s=WAIT_S,
            send_timeout_s=WAIT_S,
        )
        gone, stays = (
            OrderReceiver.connect(address, group="g", rank=rank, head=2, timeout_s=WAIT_S)
            for rank in (0, 1)
        )
        sender = accepted.result(WAIT_S)
        gone.close()
        with pytest.raises(PeerLost, match="rank 0 is lost"):
            send_until_lost(sender)
        assert stays.receive(timeout_s=WAIT_S) is not None
        sender.close()
        stays.close()


def test_a_follower_that_left_is_lost_to_the_head(ends: Ends) -> None:
    receiver, sender = ends.connect(), ends.sender.result(WAIT_S)
    receiver.close()
    many = [Row(0, (1,) * 1000, 0)] * 10_000  # more than sockets hold
    with pytest.raises(PeerLost, match="rank 0 is lost: it takes no orders"):
        sender.send(many)


def test_a_silent_head_is_lost_after_a_while() -> None:
    ours, theirs = _tcp_pair()
    clock = iter([0.0, 0.0, 0.0, 0.0, SILENT_S + 1.0, SILENT_S + 1.0, SILENT_S + 1.0])
    receiver = OrderReceiver(ours, head=3, now=lambda: next(clock))
    assert receiver.receive(timeout_s=0) is None
    with pytest.raises(PeerLost, match="rank 3 is lost: neither order nor tick for 10 s"):
        receiver.receive(timeout_s=0)
    theirs.close()
    receiver.close()


def test_an_order_that_is_none_ends_the_follower() -> None:
    ours, theirs = _tcp_pair()
    receiver = OrderReceiver(ours, head=3)
    theirs.sendall(b"\xff" * 20)
    with pytest.raises(PeerLost, match="frame of"):
        receiver.receive(timeout_s=WAIT_S)
    theirs.close()
    receiver.close()


def test_who_does_not_come_is_named() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(PeerLost, match=r"rank 2 is lost: did not come for orders in 0\.1 s"):
        OrderSender.accept(
            listener,
            group="g",
            ranks=frozenset({2, 5}),
            timeout_s=0.1,
            send_timeout_s=1.0,
        )
    with pytest.raises(PeerLost, match="rank 0 is lost: gave no orders"):
        OrderReceiver.connect(
            ("127.0.0.1", 1),
            group="g",
            rank=2,
            head=0,
            timeout_s=0.1,
        )


def send_until_lost(sender: OrderSender) -> None:
    """A socket takes what comes before its other end is known to be closed."""
    for _ in range(1000):
        sender.send([Row(0, (1,), 0)])


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname(), timeout=WAIT_S)
        ours, _ = listener.accept()
    return ours, theirs
