"""``POST /v1/completions``: text or token ids in, plain text out; streaming and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from control.backend import OpenModel
from control.gateway import choices, prompts, serve, sse
from control.gateway.gateway import Gateway
from control.gateway.generation_text import Delta, completion_logprobs
from control.gateway.openai_shape import OpenAiShape
from control.gateway.openai_types import CompletionRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's own, for completions; a chat has the room left


def router(gateway: Gateway) -> APIRouter:
    """The route, served by ``gateway``."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/completions", summary="Go on from a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        async def encode(opened: OpenModel) -> serve.Prompts:
            return await prompts.text_prompts(opened, body.prompt)

        opened, encoded = await serve.prepare(gateway, request, body.model, encode)
        requests = prompts.plan(
            gateway,
            opened,
            body.sampling,
            encoded,
            param="prompt",
            max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            request_id=request.state.request_id,
        )
        asked = serve.Asked(opened, requests, tuple(body.stop or ()))
        shape = CompletionShape(gateway, opened, body, encoded)
        stream = sse.EventStream if body.stream else None
        return await serve.answer(gateway, request, asked, shape, stream=stream)

    return routes


class CompletionShape(OpenAiShape):
    """``text_completion``, whole and in chunks."""

    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(
        self, gateway: Gateway, opened: OpenModel, body: CompletionRequest, encoded: serve.Prompts
    ) -> None:
        super().__init__(gateway, opened, body, encoded)
        self._want_logprobs = body.logprobs is not None
        texts = _prompt_texts(opened, body.prompt, encoded) if body.echo else [""] * len(encoded)
        self._echoes = [text for text in texts for _ in range(body.n)]

    def choice(self, index: int, answer: choices.Answer) -> dict[str, Any]:
        text = self._echoes[index] + answer.delta.text
        return self._shown(index, text, answer.delta, answer.finish)

    def opening(self, index: int) -> dict[str, Any] | None:
        echo = self._echoes[index]
        return self._shown(index, echo, Delta(), None) if echo else None

    def chunks(self, piece: choices.Piece) -> Iterator[dict[str, Any]]:
        if piece.delta.text or piece.delta.tokens or piece.finish is not None:
            yield self._shown(piece.choice, piece.delta.text, piece.delta, piece.finish)

    def _shown(self, index: int, text: str, delta: Delta, finish: str | None) -> dict[str, Any]:
        logprobs = completion_logprobs(delta, self.table) if self._want_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _prompt_texts(
    opened: OpenModel,
    prompt: str | list[str] | list[int] | list[list[int]],
    encoded: serve.Prompts,
) -> list[str]:
    """The prompts as text, for ``echo``: as they came, or decoded where they came as ids."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [one for one in prompt if isinstance(one, str)]
    return texts or [opened.tokenizer.decode(list(ids), skip_special=False) for ids in encoded]
