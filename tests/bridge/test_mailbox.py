"""Selective receive against a plain list, and the waits of a mailbox."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.mailbox import NOTHING, Mailbox

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 3)),
        st.tuples(st.just("take"), st.sampled_from([None, 0, 1, 2, 3])),
    ),
    max_size=40,
)


@given(STEPS)
def test_takes_the_first_match_and_leaves_the_rest_in_order(
    steps: list[tuple[str, int | None]],
) -> None:
    mailbox = Mailbox()
    model: list[tuple[int, int]] = []
    for serial, (kind, value) in enumerate(steps):
        if kind == "put":
            assert value is not None
            mailbox.put((value, serial))
            model.append((value, serial))
            continue

        def match(message: Any, value: int | None = value) -> Any:
            return message if message[0] == value else None

        wanted = next((m for m in model if value is None or m[0] == value), NOTHING)
        assert mailbox.take(None if value is None else match) == wanted
        if wanted is not NOTHING:
            model.remove(wanted)  # type: ignore[arg-type]
        assert len(mailbox) == len(model)
    assert [mailbox.take(None) for _ in model] == model


async def test_a_message_handed_to_a_cancelled_receive_goes_back_to_its_place() -> None:
    mailbox = Mailbox()
    mailbox.put("a")
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    mailbox.wait(lambda m: m if m == "b" else None, future)
    for message in ("x", "b", "c"):
        mailbox.put(message)
    assert future.result() == "b"
    mailbox.stop_waiting(give_back=True)
    assert [mailbox.take(None) for _ in range(4)] == ["a", "x", "b", "c"]


async def test_an_error_in_the_match_function_is_the_receivers_own() -> None:
    mailbox = Mailbox()
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    mailbox.wait(lambda m: m["key"], future)
    mailbox.put("not a map")
    with pytest.raises(TypeError):
        future.result()
    assert len(mailbox) == 1


async def test_two_receives_at_a_time_are_refused() -> None:
    mailbox = Mailbox()
    loop = asyncio.get_running_loop()
    mailbox.wait(None, loop.create_future())
    with pytest.raises(RuntimeError, match="two receives"):
        mailbox.wait(None, loop.create_future())
