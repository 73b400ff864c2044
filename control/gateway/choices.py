"""The generations of one request: n choices run side by side and are read as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from control.backend import DoneEvent, FinishReason, GenerateRequest, OpenModel, TokenEvent
from control.gateway.errors import GenerationFailed
from control.gateway.gateway import Gateway
from control.gateway.generation_text import AnswerText, Delta

QUEUE_SIZE = 64  # pieces read ahead of a slow client; beyond it, the generation waits


@dataclass(frozen=True, slots=True)
class Piece:
    """The next delta of one choice; ``finish`` is set on its last one.

    Attributes:
        completion_tokens: of this choice so far.
        stop_text: the stop string that ended it, if one did.
        first_token_s: when its first token came, by the gateway's monotonic clock.
    """

    choice: int
    delta: Delta
    finish: FinishReason | None = None
    completion_tokens: int = 0
    stop_text: str | None = None
    first_token_s: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, whole."""

    delta: Delta
    finish: FinishReason
    completion_tokens: int
    stop_text: str | None = None
    first_token_s: float | None = None


async def run(
    gateway: Gateway,
    opened: OpenModel,
    requests: Sequence[GenerateRequest],
    stops: tuple[str, ...],
    *,
    arrived_s: float,
) -> AsyncGenerator[Piece, None]:
    """Run every request at once and give out their pieces as they come.

    Closing the generator, or an error in one choice, cancels all of them; each backend
    iterator is closed before this returns.

    Args:
        arrived_s: when the HTTP request came, by the gateway's monotonic clock.

    Raises:
        GenerationFailed: a choice ended with ``error`` or was cancelled by the server.
        ControlError: what the backend raised.
    """
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(QUEUE_SIZE)

    async def pump(choice: int, request: GenerateRequest) -> None:
        answer = AnswerText(opened.tokenizer.stream(), stops)
        try:
            async with aclosing(_one(gateway, choice, request, answer, arrived_s)) as pieces:
                async for piece in pieces:
                    await queue.put(piece)
        except Exception as exc:  # noqa: BLE001 - handed to the reader, who answers the client
            await queue.put(exc)

    tasks = [asyncio.create_task(pump(n, request)) for n, request in enumerate(requests)]
    gateway.metrics.active.inc(len(tasks))
    try:
        running = len(tasks)
        while running:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            running -= piece.finish is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gateway.metrics.active.dec(len(tasks))


async def collect(pieces: AsyncGenerator[Piece, None], num_choices: int) -> list[Answer]:
    """The whole answers, in order; closes ``pieces``."""
    found: list[list[Piece]] = [[] for _ in range(num_choices)]
    async with aclosing(pieces):
        async for piece in pieces:
            found[piece.choice].append(piece)
    return [
        Answer(
            Delta.join([piece.delta for piece in mine]),
            mine[-1].finish or "stop",
            mine[-1].completion_tokens,
            mine[-1].stop_text,
            mine[-1].first_token_s,
        )
        for mine in found
    ]


async def _one(
    gateway: Gateway, choice: int, request: GenerateRequest, answer: AnswerText, arrived_s: float
) -> AsyncGenerator[Piece, None]:
    metrics, clock = gateway.metrics, gateway.settings.monotonic_s
    events = gateway.backend.generate(request)
    reason: FinishReason = "error"
    first_s: float | None = None
    last_s = 0.0

    def piece(delta: Delta, finish: FinishReason | None) -> Piece:
        return Piece(choice, delta, finish, answer.num_tokens, answer.stop_text, first_s)

    try:
        async for event in events:
            if isinstance(event, DoneEvent):
                _raise_if_failed(event)
                reason = event.reason
                break
            now_s = clock()
            if first_s is None:
                first_s = now_s
                metrics.first_token.observe(now_s - arrived_s)
            else:
                metrics.inter_token.observe(now_s - last_s)
            last_s = now_s
            metrics.tokens.labels("completion").inc()
            delta = answer.push(event)
            if answer.stopped:
                yield piece(delta, "stop")
                return
            if delta.text or delta.tokens:
                yield piece(delta, None)
        else:
            raise GenerationFailed("the generation ended without saying why; try again.")
        delta, reason = answer.finish(reason)
        yield piece(delta, reason)
    finally:
        await _close(events, gateway.settings.close_timeout_s)


def _raise_if_failed(event: DoneEvent) -> None:
    if event.reason == "error":
        raise GenerationFailed(event.text or "the generation failed; try again.")
    if event.reason == "cancelled":
        raise GenerationFailed(event.text or "the server cancelled the generation; try again.")


async def _close(events: AsyncIterator[TokenEvent | DoneEvent], timeout_s: float) -> None:
    """Cancel the generation now: leaving it to the garbage collector would take seconds."""
    aclose = getattr(events, "aclose", None)
    if aclose is not None:
        async with asyncio.timeout(timeout_s):
            await aclose()
