"""``POST /v1/chat/completions``, streaming and not."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from control.backend import GenerateRequest, OpenModel
from control.gateway import choices, prompts, sse
from control.gateway.disconnect import until_disconnect
from control.gateway.gateway import Gateway
from control.gateway.generation_text import Delta, chat_logprobs, usage
from control.gateway.json_response import Json
from control.gateway.openai_types import ChatRequest


def router(gateway: Gateway) -> APIRouter:
    """The route, served by ``gateway``."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        arrived_s = request.state.arrived_s
        requests: list[GenerateRequest] = []

        async def prepare() -> OpenModel:
            timeout_s = gateway.settings.open_timeout_s
            opened = await gateway.backend.open_model(body.model, timeout_s=timeout_s)
            ids = await prompts.chat_prompt(opened, body.messages)
            requests.extend(
                prompts.plan(
                    gateway,
                    opened,
                    body,
                    [ids],
                    param="messages",
                    max_tokens=body.max_completion_tokens or body.max_tokens,
                    logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                    request_id=request.state.request_id,
                )
            )
            return opened

        opened = await until_disconnect(request.receive, prepare())
        stops = tuple(body.stop or ())
        pieces = choices.run(gateway, opened, requests, stops, arrived_s=arrived_s)
        shape = _Shape(gateway, opened, body, requests)
        if body.stream:
            write_timeout_s = gateway.settings.write_timeout_s
            return sse.EventStream(_frames(shape, pieces), write_timeout_s=write_timeout_s)
        work = choices.collect(pieces, len(requests))
        return Json(shape.whole(await until_disconnect(request.receive, work)))

    return routes


class _Shape:
    """OpenAI's objects for one chat request."""

    def __init__(
        self,
        gateway: Gateway,
        opened: OpenModel,
        body: ChatRequest,
        requests: Sequence[GenerateRequest],
    ) -> None:
        self._table = opened.tokenizer
        self._want_logprobs = body.logprobs
        self.prompt_tokens = len(requests[0].prompt_ids)
        self.num_choices = len(requests)
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(gateway.settings.now_s()),
            "model": opened.id,
        }

    def whole(self, answers: Sequence[choices.Answer]) -> dict[str, Any]:
        """``chat.completion``."""
        shown = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.delta.text, "refusal": None},
                "logprobs": self._logprobs(answer.delta),
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(answers)
        ]
        completion_tokens = sum(answer.completion_tokens for answer in answers)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": shown,
            "usage": usage(self.prompt_tokens, completion_tokens),
        }

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        """``chat.completion.chunk`` of one choice."""
        shown = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._frame([shown], {"usage": None} if self.include_usage else {})

    def usage_chunk(self, completion_tokens: int) -> bytes:
        """The last chunk, which has no choices."""
        return self._frame([], {"usage": usage(self.prompt_tokens, completion_tokens)})

    def text_chunk(self, index: int, delta: Delta) -> bytes:
        """A chunk with the next text of one choice."""
        return self.chunk(index, {"content": delta.text}, logprobs=self._logprobs(delta))

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return chat_logprobs(delta.tokens, self._table) if self._want_logprobs else None

    def _frame(self, shown: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
        head = {**self._head, "object": "chat.completion.chunk"}
        return sse.frame({**head, "choices": shown, **extra})


async def _frames(
    shape: _Shape, pieces: AsyncGenerator[choices.Piece, None]
) -> AsyncGenerator[bytes, None]:
    begun: set[int] = set()
    tokens = [0] * shape.num_choices
    async with aclosing(pieces):
        async for piece in pieces:
            tokens[piece.choice] = piece.completion_tokens
            if piece.choice not in begun:
                begun.add(piece.choice)
                yield shape.chunk(piece.choice, {"role": "assistant", "content": ""})
            if piece.delta.text or piece.delta.tokens:
                yield shape.text_chunk(piece.choice, piece.delta)
            if piece.finish is not None:
                yield shape.chunk(piece.choice, {}, piece.finish)
    if shape.include_usage:
        yield shape.usage_chunk(sum(tokens))
    yield sse.DONE
