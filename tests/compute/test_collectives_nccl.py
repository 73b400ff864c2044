"""How NCCL's operations are waited for, tried on gloo's: what blocks here blocks there.

Not tried, for want of two GPUs: what NCCL itself does when it is aborted while a communicator is
being made. One GPU alone is tried by ``python -m compute.cuda_check``.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed

from compute.call_thread import CallThread
from compute.collectives import Rendezvous, join
from compute.collectives_nccl import Patience
from compute.errors import JoinRefused, PeerLost

pytestmark = pytest.mark.slow  # for the import of torch

dist: Any = torch.distributed  # parts of it are not in its type information
SHORT_S, LATE_S, WAIT_S = 0.2, 3.0, 20.0


@pytest.fixture
def patience() -> Iterator[Patience]:
    patience = Patience("test")
    yield patience
    patience.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Any]]:
    """Two ranks of a torch group."""
    store = dist.HashStore()
    with ThreadPoolExecutor(max_workers=2) as pool:
        limit = timedelta(seconds=WAIT_S)
        calls = [pool.submit(dist.ProcessGroupGloo, store, rank, 2, limit) for rank in range(2)]
        groups = [call.result(timeout=WAIT_S) for call in calls]
    yield groups
    for group in groups:
        group.abort()


def silent_for(
    patience: Patience, start: Any, communicator: str = "all", timeout_s: float = SHORT_S
) -> float:
    """Seconds until the loss is known."""
    start_s = time.monotonic()
    with pytest.raises(PeerLost, match=f"silent for {timeout_s:g} s"):
        patience.run(start, timeout_s, communicator=communicator)
    return time.monotonic() - start_s


def test_a_communicator_that_is_never_made_ends_in_time(patience: Patience) -> None:
    """One rank does not come to the first operation: starting it does not return."""
    never = threading.Event()
    try:
        assert SHORT_S <= silent_for(patience, never.wait) < LATE_S
        assert silent_for(patience, never.wait) < LATE_S  # nothing runs behind it
    finally:
        never.set()


def test_every_communicator_may_block_when_it_is_new(patience: Patience, pair: list[Any]) -> None:
    never = threading.Event()
    x = [torch.ones(3), torch.ones(3)]
    other = pair[1].allreduce([x[1]])
    patience.run(lambda: pair[0].allreduce([x[0]]), WAIT_S, communicator="all")
    other.wait()
    try:
        assert silent_for(patience, never.wait, communicator="1") < LATE_S
    finally:
        never.set()


def test_operations_run_and_only_the_first_on_a_thread(patience: Patience, pair: list[Any]) -> None:
    threads = []
    for value in (1.0, 2.0, 3.0):
        x = [torch.full((5,), value), torch.full((5,), value)]
        other = pair[1].allreduce([x[1]])

        def start(mine: torch.Tensor = x[0]) -> Any:
            threads.append(threading.current_thread())
            return pair[0].allreduce([mine])

        patience.run(start, WAIT_S, communicator="all")
        other.wait()
        assert x[0].tolist() == [2 * value] * 5
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [False, True, True]


def test_an_operation_that_never_ends_is_given_up(patience: Patience, pair: list[Any]) -> None:
    receiving = torch.empty(3)  # nobody sends it
    taken_s = silent_for(patience, lambda: pair[0].recv([receiving], 1, 77))
    assert SHORT_S <= taken_s < LATE_S


def test_starting_and_waiting_share_one_limit(patience: Patience, pair: list[Any]) -> None:
    receiving, limit_s = torch.empty(3), 0.5

    def slow() -> Any:
        threading.Event().wait(limit_s * 0.9)
        return pair[0].recv([receiving], 1, 78)

    assert limit_s <= silent_for(patience, slow, timeout_s=limit_s) < limit_s * 1.8


def test_what_fails_is_a_loss(patience: Patience) -> None:
    def fails() -> Any:
        raise RuntimeError("[x.cpp:1] connection reset by peer. This is typically ...\nat ...")

    with pytest.raises(PeerLost) as caught:
        patience.run(fails, WAIT_S, communicator="all")
    assert caught.value.why == "connection reset by peer."


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_joining_is_refused() -> None:
    rendezvous = Rendezvous(instance="i", epoch=1, rank=0, hosts=("a",), timeout_s=1)
    listener = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(JoinRefused, match="CUDA"):
        join(rendezvous, backend="nccl", device="cuda:0", listener=listener)
    assert listener.fileno() == -1  # it was taken over, and is gone


def test_a_thread_hands_back_results_and_errors() -> None:
    thread = CallThread("test")
    assert thread.run(lambda: 5, WAIT_S) == 5
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0, WAIT_S)
    with pytest.raises(KeyError):
        thread.run(lambda: dict[str, int]()["x"], WAIT_S)
    name = thread.run(lambda: threading.current_thread().name, WAIT_S)
    assert (name, thread.run(threading.get_ident, WAIT_S)) != ("test", threading.get_ident())
    thread.close()
    thread.close()


def test_a_thread_that_is_stuck_takes_no_other_call() -> None:
    never, thread = threading.Event(), CallThread("test")
    with pytest.raises(TimeoutError, match=r"no return in 0.05 s"):
        thread.run(never.wait, 0.05)
    never.set()
    with pytest.raises(TimeoutError, match="earlier call"):  # its result may not be taken for ours
        thread.run(lambda: 5, WAIT_S)
    thread.close()
