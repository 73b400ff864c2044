"""Every operation on every backend against numpy, on real processes; joining; leaving no trace."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from compute.collectives import Rendezvous, choose_backend, join
from tests.compute.collective_ranks import START_S, Ranks, World, memory_names, socket_lines
from tests.compute.collective_worker import make
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="pipes are polled as on Unix"),
]

SIZES = [1, 17, 576, 4097, 16 * 1024 + 5, 70_001]
SHAPES_OF_HOSTS = {"shm": "aaaa", "gloo": "abcd", "hosts": "aabb"}


def world_of(ranks: Ranks, backend: str, count: int) -> World:
    return World(ranks.take(count), backend, hosts=SHAPES_OF_HOSTS[backend][:count]).join()


def ordered_sum(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """In rank order, rounded after every addition, as all ranks must have it bit for bit."""
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


WORLDS = [
    *(("shm", count) for count in (2, 3, 4)),
    *(("gloo", count) for count in (2, 3, 4)),
    *(("hosts", count) for count in (3, 4)),
]


@pytest.mark.parametrize(("backend", "count"), WORLDS)
def test_operations_against_numpy(ranks: Ranks, backend: str, count: int) -> None:
    world = world_of(ranks, backend, count)
    for seed, size in enumerate(SIZES):
        _check_sum(world, backend, count, seed, size)
    for shapes in ([[3, 5]] * count, [[2 * r + 1, 7] for r in range(count)], _some_empty(count)):
        _check_gather(world, count, shapes, "float32")
    for root in range(count):
        for size in (0, 1, 50_000):
            _check_broadcast(world, root, size, "float32")
    for dtype in ("float64", "int64", "uint8", "float16"):
        _check_gather(world, count, [[3, 5]] * count, dtype)
        _check_broadcast(world, count - 1, 1001, dtype)
    _check_swaps(world, count)
    world.run(op="barrier", times=20)
    world.close()


def _some_empty(count: int) -> list[list[int]]:
    return [[0] if r == 0 else [r * 40_001] for r in range(count)]


def _check_sum(world: World, backend: str, count: int, seed: int, size: int) -> None:
    arrays = world.run(op="all_reduce_sum", shape=[size], seed=seed)
    mine = [make(seed, r, [size], "float32") for r in range(count)]
    if backend == "hosts":
        expected = ordered_sum([ordered_sum(mine[:2]), ordered_sum(mine[2:])])
    else:
        expected = ordered_sum(mine)
    for rank, (got,) in enumerate(arrays):
        assert got.tobytes() == expected.tobytes(), f"rank {rank}, {size} floats"


def _check_gather(world: World, count: int, shapes: list[list[int]], dtype: str) -> None:
    arrays = world.run(op="all_gather", shapes=shapes, dtype=dtype, seed=5)
    for outs in arrays:
        assert len(outs) == count
        for rank, got in enumerate(outs):
            np.testing.assert_array_equal(got, make(5, rank, shapes[rank], dtype).reshape(-1))


def _check_broadcast(world: World, root: int, size: int, dtype: str) -> None:
    arrays = world.run(op="broadcast", root=root, shape=[size], dtype=dtype, seed=root)
    for (got,) in arrays:
        np.testing.assert_array_equal(got, make(root, root, [size], dtype))


def _check_swaps(world: World, count: int) -> None:
    """Rank 0 with the last, the others rest; sizes below and above what a channel holds."""
    last = count - 1
    for size in (0, 1, 577, 300_003):
        for rank, process in enumerate(world.processes):
            peer = {0: last, last: 0}.get(rank)
            process.tell({"op": "swap", "with": peer, "shape": [size], "seed": 9})
        arrays = world.run_answers()
        for rank, other in ((0, last), (last, 0)):
            np.testing.assert_array_equal(arrays[rank][0], make(9, other, [size], "float32"))


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_torch_tensors_change_in_place(ranks: Ranks, backend: str) -> None:
    world = world_of(ranks, backend, 2)
    expected = ordered_sum([make(1, r, [3, 5], "float32") for r in range(2)])
    for (got,) in world.run(op="all_reduce_sum", shape=[3, 5], seed=1, torch=True):
        np.testing.assert_array_equal(got, expected.reshape(-1))
    world.close()


def test_ranks_that_disagree_are_told(ranks: Ranks) -> None:
    world = world_of(ranks, "shm", 2)
    world.processes[0].tell({"op": "all_reduce_sum", "shape": [5]})
    world.processes[1].tell({"op": "all_reduce_sum", "shape": [6]})
    errors = [answer["error"] for answer in world.hear()]
    assert "ValueError" in errors
    assert set(errors) <= {"ValueError", "PeerLost"}
    world.tell(op="barrier")
    assert [answer["error"] for answer in world.hear()] == ["PeerLost"] * 2


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_an_older_epoch_does_not_join(ranks: Ranks, backend: str) -> None:
    processes = ranks.take(3)
    new = World(processes[:2], backend, hosts="ab" if backend == "gloo" else "", timeout_s=30)
    late = {**new.options, "epoch": new.epoch - 1, "rank": 1, "timeout_s": 0.5}
    new.start_join_first()
    late["tcp_port"] = new.options["tcp_port"]
    processes[2].tell({"join": late})
    refused = processes[2].hear()
    assert refused["error"] in ("PeerLost", "JoinRefused"), refused
    new.start_join_others()
    assert [answer.get("rank") for answer in new.hear()] == [0, 1]
    new.run(op="all_reduce_sum", shape=[10])
    new.close()


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_rank_that_does_not_come_ends_the_wait(ranks: Ranks, backend: str) -> None:
    processes = ranks.take(2)
    world = World(processes, backend, timeout_s=0.5, hosts="ab" if backend == "gloo" else "")
    world.start_join_first()
    answer = processes[0].hear()
    assert answer["error"] == "PeerLost", answer
    assert answer["rank"] == 1
    processes[1].tell({"join": {**world.options, "rank": 1}})
    answer = processes[1].hear()
    assert (answer["error"], answer["rank"]) == ("PeerLost", 0), answer


def test_a_stranger_of_the_same_epoch_is_refused(ranks: Ranks) -> None:
    processes = ranks.take(3)
    world = World(processes[:2], "shm", timeout_s=30)
    world.start_join_first()
    wait_until(lambda: socket_lines(world), START_S, "rank 0 listens")
    processes[2].tell({"join": {**world.options, "rank": 0}})
    answer = processes[2].hear()
    assert answer["error"] == "JoinRefused", answer
    assert "already" in answer["why"]
    world.start_join_others()
    assert [answer.get("rank") for answer in world.hear()] == [0, 1]
    world.close()


def test_epochs_follow_each_other_in_the_same_processes(ranks: Ranks) -> None:
    for backend in ("shm", "gloo", "hosts", "shm"):
        world = world_of(ranks, backend, 3)
        world.run(op="all_reduce_sum", shape=[100])
        world.close()
    assert not memory_names()


def test_a_group_of_one_does_nothing() -> None:
    rendezvous = Rendezvous(instance="i", epoch=1, rank=0, hosts=("a",), timeout_s=1)
    group = join(rendezvous)
    x = np.arange(4, dtype=np.float32)
    assert group.backend == "single"
    assert group.all_reduce_sum(x, timeout_s=1) is x
    assert group.broadcast(x, root=0, timeout_s=1) is x
    (copy,) = group.all_gather(x, timeout_s=1)
    assert copy is not x
    np.testing.assert_array_equal(copy, x)
    group.barrier(timeout_s=1)
    with pytest.raises(ValueError, match="no rank 1"):
        group.send(x, to=1, timeout_s=1)
    group.close()


@pytest.mark.parametrize(
    ("hosts", "device", "backend"),
    [
        ("a", "cuda:0", "single"),
        ("aa", "cpu", "shm"),
        ("ab", "cpu", "gloo"),
        ("aab", "cpu", "hosts"),
        ("aa", "cuda:0", "nccl"),
        ("aa", "mlx", "mlx"),
    ],
)
def test_the_backend_follows_device_and_hosts(hosts: str, device: str, backend: str) -> None:
    rendezvous = Rendezvous(instance="i", epoch=1, rank=0, hosts=tuple(hosts), timeout_s=1)
    assert choose_backend(rendezvous, device) == backend
