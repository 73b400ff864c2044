"""``POST /v1/completions``: text or token ids in, plain text out; streaming and not."""

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
from control.gateway.generation_text import Delta, completion_logprobs, usage
from control.gateway.json_response import Json
from control.gateway.openai_types import CompletionRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's own, for completions; a chat has the room left


def router(gateway: Gateway) -> APIRouter:
    """The route, served by ``gateway``."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/completions", summary="Go on from a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        arrived_s = request.state.arrived_s

        async def prepare() -> tuple[OpenModel, list[tuple[int, ...]]]:
            timeout_s = gateway.settings.open_timeout_s
            opened = await gateway.backend.open_model(body.model, timeout_s=timeout_s)
            return opened, await prompts.text_prompts(opened, body.prompt)

        opened, encoded = await until_disconnect(request.receive, prepare())
        requests = prompts.plan(
            gateway,
            opened,
            body,
            encoded,
            param="prompt",
            max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            request_id=request.state.request_id,
        )
        stops = tuple(body.stop or ())
        pieces = choices.run(gateway, opened, requests, stops, arrived_s=arrived_s)
        shape = _Shape(gateway, opened, body, encoded, requests)
        if body.stream:
            write_timeout_s = gateway.settings.write_timeout_s
            return sse.EventStream(_frames(shape, pieces), write_timeout_s=write_timeout_s)
        work = choices.collect(pieces, len(requests))
        return Json(shape.whole(await until_disconnect(request.receive, work)))

    return routes


class _Shape:
    """OpenAI's objects for one completion request."""

    def __init__(
        self,
        gateway: Gateway,
        opened: OpenModel,
        body: CompletionRequest,
        encoded: Sequence[tuple[int, ...]],
        requests: Sequence[GenerateRequest],
    ) -> None:
        self._table = opened.tokenizer
        self._want_logprobs = body.logprobs is not None
        self.prompt_tokens = sum(len(ids) for ids in encoded)
        self.num_choices = len(requests)
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        texts = _prompt_texts(opened, body.prompt, encoded) if body.echo else [""] * len(encoded)
        self.echoes = [text for text in texts for _ in range(body.n)]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(gateway.settings.now_s()),
            "model": opened.id,
        }

    def whole(self, answers: Sequence[choices.Answer]) -> dict[str, Any]:
        """``text_completion``."""
        shown = [
            self._choice(index, self.echoes[index] + answer.delta.text, answer.delta, answer.finish)
            for index, answer in enumerate(answers)
        ]
        completion_tokens = sum(answer.completion_tokens for answer in answers)
        return {
            **self._head,
            "choices": shown,
            "usage": usage(self.prompt_tokens, completion_tokens),
        }

    def chunk(self, index: int, text: str, delta: Delta, finish: str | None = None) -> bytes:
        """The next text of one choice."""
        shown = self._choice(index, text, delta, finish)
        extra = {"usage": None} if self.include_usage else {}
        return sse.frame({**self._head, "choices": [shown], **extra})

    def usage_chunk(self, completion_tokens: int) -> bytes:
        """The last chunk, which has no choices."""
        shown = usage(self.prompt_tokens, completion_tokens)
        return sse.frame({**self._head, "choices": [], "usage": shown})

    def _choice(self, index: int, text: str, delta: Delta, finish: str | None) -> dict[str, Any]:
        logprobs = completion_logprobs(delta, self._table) if self._want_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _prompt_texts(
    opened: OpenModel,
    prompt: str | list[str] | list[int] | list[list[int]],
    encoded: Sequence[tuple[int, ...]],
) -> list[str]:
    """The prompts as text, for ``echo``: as they came, or decoded where they came as ids."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [one for one in prompt if isinstance(one, str)]
    return texts or [opened.tokenizer.decode(list(ids), skip_special=False) for ids in encoded]


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
                if shape.echoes[piece.choice]:
                    yield shape.chunk(piece.choice, shape.echoes[piece.choice], Delta())
            if piece.delta.text or piece.delta.tokens or piece.finish is not None:
                yield shape.chunk(piece.choice, piece.delta.text, piece.delta, piece.finish)
    if shape.include_usage:
        yield shape.usage_chunk(sum(tokens))
    yield sse.DONE
