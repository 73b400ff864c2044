"""The engine's thread: what counts as being busy with a step."""

from __future__ import annotations

import threading

import pytest

from compute.engine_thread import EngineThread

WAIT_S = 10.0


def test_a_load_is_no_step_however_long_it_takes() -> None:
    crashed: list[BaseException] = []
    thread = EngineThread(emit=lambda events: None, on_crash=crashed.append)
    thread.start()
    loading, let_go = threading.Event(), threading.Event()

    def load() -> str:
        loading.set()
        assert let_go.wait(WAIT_S)
        return "loaded"

    future = thread.run(load)
    assert loading.wait(WAIT_S)
    assert not thread.busy  # a rank that is busy without steps would be killed
    let_go.set()
    assert future.result(WAIT_S) == "loaded"
    assert not crashed


def test_an_error_of_a_job_is_the_askers_and_the_thread_goes_on() -> None:
    thread = EngineThread(emit=lambda events: None, on_crash=lambda error: None)
    thread.start()

    def fail() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        thread.run(fail).result(WAIT_S)
    assert thread.run(lambda: 7).result(WAIT_S) == 7
