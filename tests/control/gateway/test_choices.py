"""Side-by-side generations without a server: backpressure, seeds, closing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from control.backend import DoneEvent, GenerateRequest, TokenEvent
from control.gateway import choices
from control.gateway.errors import GenerationFailed
from control.gateway.gateway import Gateway
from control.gateway.metrics import Metrics
from control.gateway.settings import GatewaySettings
from tests.control.gateway.fake_backend import MODEL, FakeBackend


class Endless(FakeBackend):
    """Never stops talking."""

    given = 0

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[TokenEvent | DoneEvent, None]:
        self.active += 1
        try:
            while True:
                await asyncio.sleep(0)
                yield TokenEvent(self.given, 65)
                self.given += 1
        finally:
            self.active -= 1


class Silent(FakeBackend):
    """Breaks the protocol: ends without a DoneEvent."""

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[TokenEvent | DoneEvent, None]:
        yield TokenEvent(0, 65)


def gateway_of(backend: FakeBackend) -> Gateway:
    settings = GatewaySettings()
    return Gateway(backend, None, settings, Metrics(settings.registry))


async def pieces_of(backend: FakeBackend, count: int) -> AsyncGenerator[choices.Piece, None]:
    gateway = gateway_of(backend)
    opened = await backend.open_model(MODEL, timeout_s=1.0)
    request = GenerateRequest(model=MODEL, prompt_ids=(1,), max_tokens=9)
    return choices.run(gateway, opened, [request] * count, (), arrived_s=0.0)


def test_a_slow_reader_makes_the_generation_wait() -> None:
    async def main() -> None:
        backend = Endless()
        async with aclosing(await pieces_of(backend, 1)) as pieces:
            await anext(pieces)
            for _ in range(20 * choices.QUEUE_SIZE):
                await asyncio.sleep(0)
            assert backend.given <= choices.QUEUE_SIZE + 3
            assert backend.active == 1
        assert backend.active == 0

    asyncio.run(main())


def test_closing_cancels_every_choice() -> None:
    async def main() -> None:
        backend = FakeBackend(hold_at=1)
        async with aclosing(await pieces_of(backend, 3)) as pieces:
            await anext(pieces)
            assert backend.active == 3
        assert backend.active == 0

    asyncio.run(main())


def test_an_answer_without_an_end_is_an_error() -> None:
    async def main() -> None:
        with pytest.raises(GenerationFailed, match="without saying why"):
            await choices.collect(await pieces_of(Silent(), 1), 1)

    asyncio.run(main())
