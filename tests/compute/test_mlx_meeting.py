"""Ranks meet before they close a ring: only those of one epoch, and nobody waits for ever."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from compute.collectives import Rendezvous
from compute.errors import JoinRefused, PeerLost
from compute.mlx.meeting import meet

WAIT_S = 20.0
HOSTS = ("a", "b", "c")


def order(
    rank: int, tcp_port: int, *, epoch: int = 3, name: str = "x", hosts: Sequence[str] = HOSTS
) -> Rendezvous:
    return Rendezvous(
        instance=name,
        epoch=epoch,
        rank=rank,
        hosts=tuple(hosts),
        address=("127.0.0.1", tcp_port),
        timeout_s=WAIT_S,
    )


class Ranks:
    """Calls of ``meet`` under way, around one listener."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.tcp_port = int(self.listener.getsockname()[1])
        self._pool = pool

    def start(self, rendezvous: Rendezvous, *, within_s: float = WAIT_S) -> Future[None]:
        listener = self.listener if rendezvous.rank == 0 else None
        return self._pool.submit(meet, rendezvous, time.monotonic() + within_s, listener)

    def knock(self, line: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.tcp_port), timeout=WAIT_S)
        connection.sendall(line)
        return connection

    def hello(self, rank: int, **changed: object) -> bytes:
        key = order(0, 0).keyed("ring")
        said = {"key": key, "epoch": 3, "rank": rank, "hosts": HOSTS, **changed}
        return json.dumps(said).encode() + b"\n"


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with ThreadPoolExecutor(max_workers=4) as pool:
        ranks = Ranks(pool)
        yield ranks
        ranks.listener.close()


def test_all_meet_in_any_order(ranks: Ranks) -> None:
    calls = [ranks.start(order(rank, ranks.tcp_port)) for rank in (2, 0, 1)]
    for call in calls:
        call.result(timeout=WAIT_S)


def test_strangers_learn_nothing_and_hold_up_nobody(ranks: Ranks) -> None:
    first = ranks.start(order(0, ranks.tcp_port))
    silent = ranks.knock(b"")
    strangers = [
        ranks.knock(line)
        for line in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[]\n",
            b'{"key": "x"}\n',
            b"[" * 1020 + b"\n",
            b"[" * 60_000 + b"\n",
            b"\xff\n",
            b"{" * 70_000,
            ranks.hello(1, key="y"),
            ranks.hello(1, key=order(0, 0, name="y").keyed("ring")),
            ranks.hello(1, key="\ud800"),
            ranks.hello(1, key=["x"]),
            ranks.hello(1, epoch="z"),
            ranks.hello(1, epoch=1e999),
            ranks.hello(1, epoch=4),  # not what the key is of
            ranks.hello(10**300),
        )
    ]
    others = [ranks.start(order(rank, ranks.tcp_port)) for rank in (1, 2)]
    for call in (first, *others):
        call.result(timeout=WAIT_S)
    for stranger in (silent, *strangers):
        with stranger:
            try:
                assert stranger.recv(100) == b""
            except ConnectionResetError:
                continue  # there was more of it than anybody read


def test_a_rank_of_an_epoch_that_is_over_is_refused(ranks: Ranks) -> None:
    first = ranks.start(order(0, ranks.tcp_port))
    late = ranks.start(order(1, ranks.tcp_port, epoch=2))
    with pytest.raises(JoinRefused, match="at epoch 3, this one 2"):
        late.result(timeout=WAIT_S)
    others = [ranks.start(order(rank, ranks.tcp_port)) for rank in (1, 2)]
    for call in (first, *others):
        call.result(timeout=WAIT_S)


def test_a_rank_waits_until_an_older_rank_0_has_gone(ranks: Ranks) -> None:
    old = ranks.start(order(0, ranks.tcp_port, epoch=2), within_s=0.5)
    others = [ranks.start(order(rank, ranks.tcp_port)) for rank in (1, 2)]
    with pytest.raises(PeerLost, match="rank 1 is lost: it did not come"):
        old.result(timeout=WAIT_S)
    ranks.listener = socket.create_server(("127.0.0.1", ranks.tcp_port))
    first = ranks.start(order(0, ranks.tcp_port))
    for call in (first, *others):
        call.result(timeout=WAIT_S)


def test_who_leaves_is_named_to_all(ranks: Ranks) -> None:
    with ranks.knock(ranks.hello(2)) as second:
        ranks.knock(ranks.hello(1)).close()
        first = ranks.start(order(0, ranks.tcp_port))
        with pytest.raises(PeerLost, match="rank 1 is lost: it left while joining"):
            first.result(timeout=WAIT_S)
        told = second.recv(1000)
    assert json.loads(told) == {"lost": 1, "why": "it left while joining"}


def test_a_rank_believes_what_rank_0_tells(ranks: Ranks) -> None:
    second = ranks.start(order(2, ranks.tcp_port))
    guest, _ = ranks.listener.accept()
    with guest:
        assert json.loads(guest.recv(1000))["rank"] == 2
        guest.sendall(b'{"lost": 1, "why": "it fell"}\n')
        with pytest.raises(PeerLost, match="rank 1 is lost: it fell"):
            second.result(timeout=WAIT_S)


def test_a_rank_passes_over_what_is_no_answer(ranks: Ranks) -> None:
    first = ranks.start(order(1, ranks.tcp_port))
    lines = (b"[" * 1020, b"[]", b'{"lost": "z"}', b'{"epoch": null}', b'{"all": 1}', b"\xff", b"")
    for line in lines:
        guest, _ = ranks.listener.accept()
        with guest:
            assert guest.recv(1000)
            guest.sendall(line + b"\n")
    guest, _ = ranks.listener.accept()
    with guest:
        guest.sendall(b'{"all": true}\n')
        first.result(timeout=WAIT_S)


def test_who_never_comes_is_named(ranks: Ranks) -> None:
    first = ranks.start(order(0, ranks.tcp_port), within_s=0.3)
    with pytest.raises(PeerLost, match="rank 1 is lost: it did not come"):
        first.result(timeout=WAIT_S)
    alone = ranks.start(order(2, ranks.tcp_port), within_s=0.2)
    with pytest.raises(PeerLost, match="rank 0 is lost: it did not come"):
        alone.result(timeout=WAIT_S)


def test_another_shape_or_a_second_time_is_refused(ranks: Ranks) -> None:
    first = ranks.start(order(0, ranks.tcp_port))
    with ranks.knock(ranks.hello(1)), ranks.knock(ranks.hello(1)) as twice:
        other = ranks.start(order(2, ranks.tcp_port, hosts=("a", "b", "d")))
        for call in (first, other):
            with pytest.raises(JoinRefused, match="sees another group"):
                call.result(timeout=WAIT_S)
        assert twice.recv(100) in (b'{"refused": "rank 1 has joined already"}\n', b"")


def test_an_address_that_is_taken(ranks: Ranks) -> None:
    with pytest.raises(JoinRefused, match="cannot listen"):
        meet(order(0, ranks.tcp_port), time.monotonic() + 1, None)
