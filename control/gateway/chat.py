"""``POST /v1/chat/completions``, streaming and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from control.backend import OpenModel
from control.gateway import choices, prompts, serve, sse
from control.gateway.gateway import Gateway
from control.gateway.generation_text import Delta, chat_logprobs
from control.gateway.openai_shape import OpenAiShape
from control.gateway.openai_types import ChatRequest
from control.gateway.turn import Turn


def router(gateway: Gateway) -> APIRouter:
    """The route, served by ``gateway``."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        turns = [Turn(message.role, message.text) for message in body.messages]

        async def encode(opened: OpenModel) -> serve.Prompts:
            return [await prompts.chat_prompt(opened, turns)]

        opened, encoded = await serve.prepare(gateway, request, body.model, encode)
        requests = prompts.plan(
            gateway,
            opened,
            body.sampling,
            encoded,
            param="messages",
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            request_id=request.state.request_id,
        )
        asked = serve.Asked(opened, requests, tuple(body.stop or ()))
        shape = ChatShape(gateway, opened, body, encoded)
        stream = sse.EventStream if body.stream else None
        return await serve.answer(gateway, request, asked, shape, stream=stream)

    return routes


class ChatShape(OpenAiShape):
    """``chat.completion`` and its chunks."""

    id_prefix, object_name = "chatcmpl", "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self, gateway: Gateway, opened: OpenModel, body: ChatRequest, encoded: serve.Prompts
    ) -> None:
        super().__init__(gateway, opened, body, encoded)
        self._want_logprobs = body.logprobs

    def choice(self, index: int, answer: choices.Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.delta.text, "refusal": None},
            "logprobs": self._logprobs(answer.delta),
            "finish_reason": answer.finish,
        }

    def opening(self, index: int) -> dict[str, Any]:
        return _delta(index, {"role": "assistant", "content": ""})

    def chunks(self, piece: choices.Piece) -> Iterator[dict[str, Any]]:
        if piece.delta.text or piece.delta.tokens:
            text = {"content": piece.delta.text}
            yield _delta(piece.choice, text, logprobs=self._logprobs(piece.delta))
        if piece.finish is not None:
            yield _delta(piece.choice, {}, finish=piece.finish)

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return chat_logprobs(delta.tokens, self.table) if self._want_logprobs else None


def _delta(
    index: int,
    delta: dict[str, Any],
    *,
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
