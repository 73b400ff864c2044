"""The id of an instance stays with its ranks: nothing that others can see or read tells it."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed

from compute.collectives import Backend, Group, Rendezvous, join
from compute.errors import JoinRefused, PeerLost
from compute.links import Meeting

pytestmark = pytest.mark.slow  # for the import of torch

WAIT_S = 20.0
SHORT_S = 0.4
EPOCH = 7
SECRET = secrets.token_hex(16)
HOSTS: dict[Backend, str] = {"shm": "aa", "gloo": "ab", "hosts": "aab", "mlx": "ab"}


class Joins:
    """Calls of ``join`` under way, around one listener of rank 0."""

    def __init__(self, pool: ThreadPoolExecutor, backend: Backend) -> None:
        self.backend = backend
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.tcp_port = int(self.listener.getsockname()[1])
        self._pool = pool

    def rendezvous(
        self,
        rank: int,
        *,
        epoch: int = EPOCH,
        instance: str = SECRET,
        hosts: Sequence[str] = (),
        timeout_s: float = SHORT_S,
    ) -> Rendezvous:
        hosts = hosts or HOSTS[self.backend]
        return Rendezvous(
            instance=f"{instance}/tensor/0",
            use="tensor",
            epoch=epoch,
            rank=rank,
            hosts=tuple(hosts),
            address=("127.0.0.1", self.tcp_port),
            ring=tuple(("127.0.0.1", 1) for _ in hosts),
            timeout_s=timeout_s,
        )

    def start(self, rendezvous: Rendezvous) -> Future[Group]:
        listens = rendezvous.rank == 0 and self.backend != "shm"
        listener = self.listener.dup() if listens else None
        return self._pool.submit(join, rendezvous, backend=self.backend, listener=listener)


@pytest.fixture
def joins(request: pytest.FixtureRequest) -> Iterator[Joins]:
    if request.param == "mlx":
        pytest.importorskip("mlx.core")
    if request.param in ("shm", "hosts") and sys.platform == "win32":
        pytest.skip("shared memory waits for nobody there")
    with ThreadPoolExecutor(max_workers=4) as pool:
        joins = Joins(pool, request.param)
        yield joins
        joins.listener.close()


def failure(call: Future[Group]) -> PeerLost | JoinRefused:
    error = call.exception(timeout=WAIT_S)
    assert isinstance(error, PeerLost | JoinRefused), error
    return error


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        yield from chain(error.__context__) if error.__cause__ is not error.__context__ else ()
        error = error.__cause__


def assert_silent(error: BaseException) -> None:
    texts = ["".join(traceback.format_exception(error))]
    for each in chain(error):
        texts += [str(each), repr(each), repr(each.args)]
    for text in texts:
        assert SECRET not in text, text


def nobody_comes(joins: Joins) -> list[Future[Group]]:
    return [joins.start(joins.rendezvous(0))]


def rank_0_does_not_come(joins: Joins) -> list[Future[Group]]:
    joins.listener.close()
    return [joins.start(joins.rendezvous(1))]


def rank_0_is_of_another_epoch(joins: Joins, epoch: int) -> list[Future[Group]]:
    first = joins.start(joins.rendezvous(0, epoch=epoch, timeout_s=2 * SHORT_S))
    return [first, joins.start(joins.rendezvous(1))]


def rank_0_is_of_a_later_epoch(joins: Joins) -> list[Future[Group]]:
    return rank_0_is_of_another_epoch(joins, EPOCH + 1)


def rank_0_is_of_an_older_epoch(joins: Joins) -> list[Future[Group]]:
    return rank_0_is_of_another_epoch(joins, EPOCH - 1)


def rank_0_is_of_another_instance(joins: Joins) -> list[Future[Group]]:
    first = joins.start(joins.rendezvous(0, instance=SECRET[::-1]))
    return [first, joins.start(joins.rendezvous(1))]


def a_rank_sees_other_hosts(joins: Joins) -> list[Future[Group]]:
    hosts = "aaa" if joins.backend == "shm" else [*HOSTS[joins.backend][:-1], "z"]
    return [joins.start(joins.rendezvous(0)), joins.start(joins.rendezvous(1, hosts=hosts))]


def a_rank_comes_twice(joins: Joins) -> list[Future[Group]]:
    hosts = HOSTS[joins.backend] + "c" if joins.backend != "shm" else "aaa"
    orders = [joins.rendezvous(rank, hosts=hosts) for rank in (0, 1, 1)]
    return [joins.start(order) for order in orders]


def rank_0_comes_twice(joins: Joins) -> list[Future[Group]]:
    calls = [joins.start(joins.rendezvous(0)) for _ in range(2 if joins.backend == "shm" else 1)]
    if joins.backend != "shm":  # the port is taken
        rendezvous = joins.rendezvous(0)
        calls.append(joins._pool.submit(join, rendezvous, backend=joins.backend))
    return calls


@pytest.mark.parametrize("joins", list(HOSTS), indirect=True)
@pytest.mark.parametrize(
    "fail",
    [
        nobody_comes,
        rank_0_does_not_come,
        rank_0_is_of_a_later_epoch,
        rank_0_is_of_an_older_epoch,
        rank_0_is_of_another_instance,
        a_rank_sees_other_hosts,
        a_rank_comes_twice,
        rank_0_comes_twice,
    ],
)
def test_no_error_of_a_join_tells_it(
    joins: Joins, fail: Callable[[Joins], list[Future[Group]]], capfd: pytest.CaptureFixture[str]
) -> None:
    for call in fail(joins):
        assert_silent(failure(call))
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize("joins", ["gloo"], indirect=True)
def test_a_stranger_learns_nothing_from_the_store(joins: Joins) -> None:
    first = joins.start(joins.rendezvous(0, timeout_s=1.0))
    store = torch.distributed.TCPStore(
        "127.0.0.1", joins.tcp_port, is_master=False, timeout=timedelta(seconds=WAIT_S)
    )
    published = store.get("epoch").decode()
    assert SECRET not in published
    assert published.startswith(f"{EPOCH}/")
    with contextlib.suppress(AttributeError):  # of newer stores
        names = store.list_keys()
        assert not any(SECRET in str(name) for name in names), names
    failure(first)


@pytest.mark.parametrize("joins", ["mlx"], indirect=True)
def test_whoever_listens_instead_of_rank_0_learns_nothing(joins: Joins) -> None:
    second = joins.start(joins.rendezvous(1))
    guest, _ = joins.listener.accept()
    with guest:
        said = guest.recv(1 << 16)
    assert json.loads(said)["rank"] == 1
    assert SECRET.encode() not in said
    assert_silent(failure(second))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the socket has a file")
@pytest.mark.parametrize("joins", ["shm"], indirect=True)
def test_the_socket_of_a_host_does_not_tell_it(joins: Joins) -> None:
    rendezvous = joins.rendezvous(0, timeout_s=1.0)
    first = joins.start(rendezvous)
    names: list[str] = []
    deadline_s = time.monotonic() + WAIT_S
    while not names and time.monotonic() < deadline_s and not first.done():
        lines = Path("/proc/net/unix").read_text().split("\n")
        names = [line.split()[-1] for line in lines if line.endswith(f"-{EPOCH}")]
    assert names
    assert all(SECRET[:8] not in name for name in names)
    failure(first)


def test_what_describes_a_rank_does_not_tell_it() -> None:
    with ThreadPoolExecutor() as pool:
        joins = Joins(pool, "gloo")
        joins.listener.close()
        assert SECRET not in repr(joins.rendezvous(0))
    meeting = Meeting(
        group=SECRET,
        epoch=EPOCH,
        rank=0,
        mesh=(),
        hosts=(),
        places=(),
        devices=(),
        timeout_s=1,
        step_timeout_s=1,
    )
    assert SECRET not in repr(meeting)


def test_keys_tell_epochs_purposes_and_instances_apart() -> None:
    with ThreadPoolExecutor() as pool:
        joins = Joins(pool, "gloo")
        joins.listener.close()
        one = joins.rendezvous(0)
        others = [one.keyed("b"), one.keyed("a", 8), joins.rendezvous(0, instance="y").keyed("a")]
        assert len({one.keyed("a"), *others}) == 4
        assert one.keyed("a") == joins.rendezvous(1).keyed("a")
        assert one.keyed("a", 8) == joins.rendezvous(1, epoch=8).keyed("a")
