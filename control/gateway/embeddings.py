"""``/v1/embeddings`` and Ollama's ``/api/embed``: no engine computes embeddings, so both refuse."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from control.gateway.ask import INERT, Ask, Many, ModelName, Text, only
from control.gateway.errors import ApiError
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json
from control.gateway.models import find_model
from control.gateway.ollama_options import KeepAlive, Options
from control.gateway.ollama_types import OllamaName
from control.gateway.openai_types import TokenId


class EmbeddingsRequest(Ask):
    """Body of ``POST /v1/embeddings``."""

    model: ModelName
    input: Text | Many[Text] | Many[TokenId] | Many[Many[TokenId]]
    encoding_format: Annotated[str | None, only("float", "base64")] = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, description=INERT)


class EmbedRequest(Ask):
    """Body of ``POST /api/embed``."""

    model: OllamaName
    input: Text | Many[Text]
    truncate: bool = True
    dimensions: int | None = Field(None, ge=1)
    options: Options | None = None
    keep_alive: KeepAlive | None = Field(None, description=INERT)


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter()

    @routes.post("/v1/embeddings", tags=["openai"], summary="Refused: no engine does this yet")
    async def embeddings(body: EmbeddingsRequest) -> Json:
        raise await _refusal(gateway, body.model)

    @routes.post("/api/embed", tags=["ollama"], summary="Refused: no engine does this yet")
    async def embed(body: EmbedRequest) -> Json:
        raise await _refusal(gateway, body.model)

    return routes


async def _refusal(gateway: Gateway, model: str) -> ApiError:
    """For a known model. Raises UnknownModel for another."""
    info = await find_model(gateway, model)
    return ApiError(
        400,
        f"embeddings: {info.id!r} gives text alone; no engine of this version computes embeddings.",
        param="model",
        code="embeddings_not_supported",
    )
