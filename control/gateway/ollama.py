"""Ollama's ``/api/chat`` and ``/api/generate``, as lines of JSON or whole."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from control.backend import OpenModel
from control.gateway import ndjson, prompts, serve
from control.gateway.auth import require
from control.gateway.cluster import control_of
from control.gateway.errors import ApiError
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json
from control.gateway.models import find_model
from control.gateway.ollama_shape import OllamaShape, Times, said
from control.gateway.ollama_types import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaGeneration,
)
from control.gateway.timestamp import timestamp
from control.keys import ADMIN

ABOUT = (
    "Streams unless stream is false. Options that are not said have Ollama's defaults: temperature "
    "0.8, top_k 40, top_p 0.9. The tag :latest is taken for no tag. A model stays loaded until it "
    "is unloaded, whatever keep_alive says; 0 without a prompt unloads it. num_ctx bounds prompt "
    "and answer, and is at most the context that the model was loaded with. Tools, formats, "
    "thinking and images are refused by name."
)


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter(tags=["ollama"])

    @routes.post("/api/chat", summary="Answer a conversation", description=ABOUT)
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        async def encode(opened: OpenModel) -> serve.Prompts:
            return [await prompts.chat_prompt(opened, body.turns, go_on=True)]

        return await _serve(gateway, request, body, encode, param="messages")

    @routes.post("/api/generate", summary="Answer a prompt", description=ABOUT)
    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        async def encode(opened: OpenModel) -> serve.Prompts:
            if body.raw:
                return await prompts.text_prompts(opened, body.prompt)
            return [await prompts.chat_prompt(opened, body.turns, param="prompt")]

        return await _serve(gateway, request, body, encode, param="prompt")

    return routes


async def _serve(
    gateway: Gateway,
    request: Request,
    body: OllamaGeneration,
    encode: serve.Encode,
    *,
    param: str,
) -> Response:
    is_chat = isinstance(body, OllamaChatRequest)
    if body.is_empty:
        return await _load_or_unload(gateway, request, body, is_chat=is_chat)

    async def encode_within(opened: OpenModel) -> serve.Prompts:
        return await encode(_within(opened, body.options.num_ctx))

    opened, encoded = await serve.prepare(gateway, request, body.model, encode_within)
    opened = _within(opened, body.options.num_ctx)
    opened_s = gateway.settings.monotonic_s()
    requests = prompts.plan(
        gateway,
        opened,
        body.options.sampling,
        encoded,
        param=param,
        max_tokens=body.options.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        request_id=request.state.request_id,
    )
    asked = serve.Asked(opened, requests, tuple(body.options.stop or ()))
    times = Times(request.state.arrived_s, opened_s)
    shape = OllamaShape(gateway, opened, body, len(encoded[0]), times, is_chat=is_chat)
    stream = ndjson.LineStream if body.stream else None
    return await serve.answer(gateway, request, asked, shape, stream=stream)


def _within(opened: OpenModel, num_ctx: int | None) -> OpenModel:
    """The model with the context that was asked for. Raises ApiError for one too large."""
    if num_ctx is None:
        return opened
    if num_ctx > opened.context_tokens:
        raise ApiError(
            400,
            f"options.num_ctx: {opened.id!r} is loaded with a context of {opened.context_tokens} "
            "tokens; ask for at most that, or load it with more.",
            param="options.num_ctx",
            code="invalid_value",
        )
    return replace(opened, context_tokens=num_ctx)


async def _load_or_unload(
    gateway: Gateway, request: Request, body: OllamaGeneration, *, is_chat: bool
) -> Response:
    """What Ollama does where nothing is to be generated."""
    if body.unloads:
        require(request, ADMIN)
        info = await find_model(gateway, body.model)
        for instance in (await gateway.backend.status())["instances"]:
            if instance["model"] == info.id:
                await control_of(gateway).unload(instance["id"])
        model, reason = info.id, "unload"
    else:

        async def nothing(opened: OpenModel) -> serve.Prompts:
            return []

        opened, _ = await serve.prepare(gateway, request, body.model, nothing)
        model, reason = opened.id, "load"
    answer = {
        "model": model,
        "created_at": timestamp(gateway.settings.now_s()),
        **said(is_chat, ""),
        "done": True,
        "done_reason": reason,
    }
    return Json(answer)
