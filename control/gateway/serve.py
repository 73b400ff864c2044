"""What every generating route does: open the model, encode, run, and answer whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from control.backend import GenerateRequest, OpenModel
from control.gateway import choices
from control.gateway.disconnect import until_disconnect
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json
from control.gateway.stream import FrameStream

Prompts = list[tuple[int, ...]]
Encode = Callable[[OpenModel], Awaitable[Prompts]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a route made of a body, ready to run."""

    opened: OpenModel
    requests: Sequence[GenerateRequest]
    stops: tuple[str, ...] = ()


class Shape(Protocol):
    """The objects of one API for the answer to one request."""

    def whole(self, answers: Sequence[choices.Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...

    def frames(self, pieces: AsyncGenerator[choices.Piece, None]) -> AsyncGenerator[bytes, None]:
        """The frames of a streamed one; closes ``pieces``."""
        ...


async def prepare(
    gateway: Gateway,
    request: Request,
    model: str,
    encode: Encode,
) -> tuple[OpenModel, Prompts]:
    """Open ``model``, waiting for it, and make token ids of the prompts, while the client stays.

    Raises:
        ClientGone, UnknownModel, NotReady, ApiError.
    """

    async def work() -> tuple[OpenModel, Prompts]:
        opened = await gateway.backend.open_model(model, timeout_s=gateway.settings.open_timeout_s)
        return opened, await encode(opened)

    return await until_disconnect(request.receive, work())


async def answer(
    gateway: Gateway,
    request: Request,
    asked: Asked,
    shape: Shape,
    *,
    stream: type[FrameStream] | None,
) -> Response:
    """Run what was asked; ``stream`` says how to send it, None sends it whole."""
    arrived_s = request.state.arrived_s
    pieces = choices.run(gateway, asked.opened, asked.requests, asked.stops, arrived_s=arrived_s)
    if stream is not None:
        frames = shape.frames(pieces)
        return stream(frames, write_timeout_s=gateway.settings.write_timeout_s)
    work = choices.collect(pieces, len(asked.requests))
    return Json(shape.whole(await until_disconnect(request.receive, work)))
