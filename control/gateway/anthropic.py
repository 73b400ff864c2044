"""``POST /v1/messages``, streaming and not, and ``/v1/messages/count_tokens``: Anthropic's API."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from control.backend import OpenModel
from control.gateway import choices, prompts, serve, sse
from control.gateway.anthropic_types import CountTokensRequest, MessagesRequest
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json

ABOUT = (
    "Turns of one role that follow each other are joined by a line break, and an assistant's turn "
    "at the end is continued. Tools, thinking, images and documents are refused by name."
)


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter(tags=["anthropic"])

    @routes.post("/v1/messages", summary="Answer a conversation", description=ABOUT)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        opened, encoded = await _prepare(gateway, body, request)
        requests = prompts.plan(
            gateway,
            opened,
            body.sampling,
            encoded,
            param="messages",
            max_tokens=body.max_tokens,
            logprobs=None,
            request_id=request.state.request_id,
        )
        asked = serve.Asked(opened, requests, tuple(body.stop_sequences or ()))
        shape = MessageShape(opened, len(encoded[0]))
        stream = sse.NamedEventStream if body.stream else None
        return await serve.answer(gateway, request, asked, shape, stream=stream)

    @routes.post("/v1/messages/count_tokens", summary="Count the tokens of a conversation")
    async def count_tokens(body: CountTokensRequest, request: Request) -> Json:
        _, encoded = await _prepare(gateway, body, request)
        return Json({"input_tokens": len(encoded[0])})

    return routes


async def _prepare(
    gateway: Gateway, body: CountTokensRequest, request: Request
) -> tuple[OpenModel, serve.Prompts]:
    async def encode(opened: OpenModel) -> serve.Prompts:
        return [await prompts.chat_prompt(opened, body.turns, go_on=True)]

    return await serve.prepare(gateway, request, body.model, encode)


class MessageShape:
    """Anthropic's ``message``, whole or as its sequence of events."""

    def __init__(self, opened: OpenModel, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": opened.id,
        }

    def whole(self, answers: Sequence[choices.Answer]) -> dict[str, Any]:
        """The message as one object; an empty text is no block."""
        (answer,) = answers
        text = answer.delta.text
        return {
            **self._head,
            "content": [{"type": "text", "text": text, "citations": None}] if text else [],
            **_end(answer),
            "usage": self._usage(answer.completion_tokens),
        }

    async def frames(
        self, pieces: AsyncGenerator[choices.Piece, None]
    ) -> AsyncGenerator[bytes, None]:
        """``message_start``, a text block with its deltas, ``message_delta``, ``message_stop``."""
        begun = block = False
        async with aclosing(pieces):
            async for piece in pieces:
                if not begun:
                    begun = True
                    yield self._start()
                    yield _event("ping")
                if piece.delta.text:
                    if not block:
                        block = True
                        empty = {"type": "text", "text": "", "citations": None}
                        yield _event("content_block_start", index=0, content_block=empty)
                    delta = {"type": "text_delta", "text": piece.delta.text}
                    yield _event("content_block_delta", index=0, delta=delta)
                if piece.finish is not None:
                    if block:
                        yield _event("content_block_stop", index=0)
                    used = self._usage(piece.completion_tokens)
                    yield _event("message_delta", delta=_end(piece), usage=used)
        yield _event("message_stop")

    def _start(self) -> bytes:
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(0),
        }
        return _event("message_start", message=message)

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "input_tokens": self._prompt_tokens,
            "output_tokens": completion_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }


def _end(last: choices.Answer | choices.Piece) -> dict[str, str | None]:
    """Why the message ended."""
    if last.stop_text is not None:
        reason = "stop_sequence"
    else:
        reason = "max_tokens" if last.finish == "length" else "end_turn"
    return {"stop_reason": reason, "stop_sequence": last.stop_text}


def _event(kind: str, **fields: Any) -> bytes:
    return sse.frame({"type": kind, **fields}, event=kind)
