"""A rank is killed or stopped inside an operation: the others learn it in time; nothing stays.

Prints the seconds from the signal to ``PeerLost``, per backend and operation.
"""

from __future__ import annotations

import signal
import socket
import sys
from typing import Any

import numpy as np
import psutil
import pytest

from tests.compute.collective_ranks import (
    START_S,
    Ranks,
    World,
    free_ports,
    memory_names,
    now_s,
    socket_lines,
)
from tests.compute.collective_worker import make
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and SIGSTOP are of Unix"),
]

SILENT_S = 0.5
LATE_S = 3.0  # what a busy machine may add
LONG_S = 20.0
HOSTS = {"shm": "aaa", "gloo": "abc", "hosts": "aab", "mlx": "abc"}


def joined(ranks: Ranks, backend: str, count: int = 3) -> World:
    ring = free_ports(count) if backend == "mlx" else ()
    hosts = HOSTS[backend][:count]
    return World(ranks.take(count), backend, hosts=hosts, ring=ring).join()


def lose_one(
    world: World,
    number: signal.Signals,
    report: pytest.CaptureFixture[str],
    *,
    of: str = "all_reduce_sum",
    num_floats: int = 576,
    timeout_s: float = SILENT_S,
) -> list[dict[str, Any]]:
    """Signal rank 1 while all ranks work together; what the others answer, with ``after_s``."""
    world.tell(op="for_ever", of=of, shape=[num_floats], timeout_s=timeout_s)
    assert all(answer == {"started": True} for answer in world.hear())
    signalled_s = now_s()
    world.processes[1].signal(number)
    answers = [p.hear() for r, p in enumerate(world.processes) if r != 1]
    for answer in answers:
        assert answer["error"] == "PeerLost", answer
        answer["after_s"] = answer["clock_s"] - signalled_s
    with report.disabled():
        times = ", ".join(f"{answer['after_s']:.4f}" for answer in answers)
        print(f"\n{world.options['backend']} {of}: {number.name} to PeerLost: {times} s", end="")
    return answers


@pytest.mark.parametrize("backend", ["shm", "gloo", "hosts"])
def test_a_killed_rank_is_noticed_at_once(
    ranks: Ranks, light_ranks: Ranks, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if backend == "shm":
        ranks = light_ranks
    world = joined(ranks, backend)
    for answer in lose_one(world, signal.SIGKILL, capsys):
        assert answer["after_s"] < LATE_S
        # With messages, it may be one that waited for the lost rank, noticed first, and left.
        assert answer["rank"] == 1 or backend != "shm", answer
    ranks.lose(world.processes[1])
    assert_usable(joined(ranks, backend))


@pytest.mark.parametrize("backend", ["shm", "gloo", "hosts"])
def test_a_stopped_rank_is_noticed_by_the_time_out(
    ranks: Ranks, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world = joined(ranks, backend)
    for answer in lose_one(world, signal.SIGSTOP, capsys):
        assert SILENT_S / 2 <= answer["after_s"] < SILENT_S + LATE_S
        # With messages, a rank that waits for one that waits for the silent one names the former.
        assert answer["rank"] == 1 or backend != "shm", answer
        assert "silent" in answer["why"] or "reported" in answer["why"] or backend == "hosts"
    others = [world.processes[0], world.processes[2]]
    alone = World(others, backend, hosts=[HOSTS[backend][0], HOSTS[backend][2]])
    if backend == "hosts":
        alone = World(others, "gloo", hosts="ab")
    assert_usable(alone.join())  # the next epoch does without it
    world.processes[1].signal(signal.SIGCONT)
    answer = world.processes[1].hear()
    assert answer["error"] == "PeerLost", answer  # it finds out that the others went on
    assert_usable(joined(ranks, backend))  # and may come back in a later one


@pytest.mark.parametrize("backend", ["gloo", "shm"])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("of", ["all_gather", "broadcast", "barrier", "receive", "send"])
def test_every_operation_ends_when_a_rank_is_lost(
    ranks: Ranks,
    light_ranks: Ranks,
    of: str,
    number: signal.Signals,
    backend: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pool = light_ranks if backend == "shm" else ranks
    in_pairs = of in ("receive", "send")
    num_floats = 2 << 20 if in_pairs else 576  # 8 MB are more than what lies between two ranks
    world = joined(pool, backend, 2 if in_pairs else 3)
    killed = number is signal.SIGKILL
    limit_s = LONG_S if killed else SILENT_S
    answers = lose_one(world, number, capsys, of=of, num_floats=num_floats, timeout_s=limit_s)
    for answer in answers:
        if killed:
            assert answer["after_s"] < LATE_S, answer  # by no time-out
        else:
            assert SILENT_S / 2 <= answer["after_s"] < SILENT_S + LATE_S
        assert answer["rank"] == 1 or (backend == "gloo" and not in_pairs), answer
    if backend == "gloo":
        first = psutil.Process(world.processes[0].pid)
        wait_until(lambda: not first.net_connections("tcp"), START_S, "all connections are closed")
    if killed:
        pool.lose(world.processes[1])
        pool.take(3)  # another one starts while the next test runs
        return
    world.processes[1].signal(signal.SIGCONT)
    answer = world.processes[1].hear()
    assert answer["error"] == "PeerLost", answer
    assert_usable(joined(pool, backend, 2))


def assert_usable(world: World) -> None:
    hosts = world.options["backend"] == "hosts"
    expected = make(3, 0, [100], "float32")
    for rank in range(1, len(world.processes)):
        expected += make(3, rank, [100], "float32")
    for (got,) in world.run(op="all_reduce_sum", shape=[100], seed=3):
        np.testing.assert_allclose(got, expected, rtol=1e-4 if hosts else 0)
    world.close()


def test_a_rank_that_leaves_is_noticed(ranks: Ranks) -> None:
    for backend in ("shm", "gloo"):
        world = joined(ranks, backend, 2)
        world.processes[0].tell({"op": "all_reduce_sum", "shape": [10], "timeout_s": 30})
        world.processes[1].tell({"close": True})
        answers = world.hear()
        assert (answers[0]["error"], answers[0]["rank"]) == ("PeerLost", 1), answers


def test_ranks_killed_while_joining(light_ranks: Ranks) -> None:
    first, second = light_ranks.take(2)
    world = World([first, second], "shm")
    world.options["hosts"] = ["a"] * 3  # the third never comes
    world.start_join_first()
    world.start_join_others()
    wait_until(lambda: len(socket_lines(world)) >= 2, START_S, "rank 1 is connected")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.settimeout(START_S)
        stranger.connect("\0" + socket_lines(world)[0].split()[-1].removeprefix("@"))
        stranger.sendall(b"{}\n")
        assert b"differs" in stranger.recv(1000)  # so who came before has been heard
    light_ranks.lose(second)
    answer = first.hear()
    assert (answer["error"], answer["rank"]) == ("PeerLost", 1), answer
    assert "ended while" in answer["why"]
    world = World([first], "shm")
    world.options["hosts"] = ["a"] * 3
    world.start_join_first()
    wait_until(lambda: socket_lines(world), START_S, "rank 0 listens")
    light_ranks.lose(first)
    assert not memory_names()


def test_all_killed_while_summing(light_ranks: Ranks) -> None:
    world = joined(light_ranks, "shm", 2)
    world.tell(op="for_ever", shape=[200_000])
    world.hear()
    for process in world.processes:
        process.signal(signal.SIGKILL)
    light_ranks.lose(*world.processes)
    assert not memory_names()


def test_the_mlx_ring(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlx.core")
    world = joined(ranks, "mlx")
    for size in (1, 576, 5001):
        total = sum(make(1, r, [size], "float32").astype(np.float64) for r in range(3))
        for (got,) in world.run(op="all_reduce_sum", shape=[size], seed=1):
            np.testing.assert_allclose(got, total, rtol=1e-5, atol=1e-4)
    shapes = [[2, 3], [1, 3], [5, 3]]
    for outs in world.run(op="all_gather", shapes=shapes, seed=2):
        for rank, got in enumerate(outs):
            np.testing.assert_array_equal(got, make(2, rank, shapes[rank], "float32").reshape(-1))
    for (got,) in world.run(op="broadcast", root=2, shape=[100], dtype="int32"):
        np.testing.assert_array_equal(got, make(0, 2, [100], "int32"))
    for rank, process in enumerate(world.processes):
        peer = {0: 1, 1: 0}.get(rank)
        process.tell({"op": "swap", "with": peer, "shape": [1000], "seed": 9})
    arrays = world.run_answers()
    np.testing.assert_array_equal(arrays[0][0], make(9, 1, [1000], "float32"))
    np.testing.assert_array_equal(arrays[1][0], make(9, 0, [1000], "float32"))
    for answer in lose_one(world, signal.SIGKILL, capsys):
        assert answer["after_s"] < LATE_S
    world.processes[0].tell({"join": {**world.options, "rank": 0, "epoch": world.epoch + 1}})
    refused = world.processes[0].hear()
    assert refused["error"] == "JoinRefused", refused
    ranks.lose(*world.processes)
    world = joined(ranks, "mlx", 2)
    for answer in lose_one(world, signal.SIGSTOP, capsys):
        assert SILENT_S / 2 <= answer["after_s"] < SILENT_S + LATE_S
    ranks.lose(*world.processes)
