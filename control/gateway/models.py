"""``GET /v1/models`` and ``/v1/models/{id}``: the catalogue, with the state of each model here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from control.backend import ModelInfo
from control.errors import UnknownModel
from control.gateway.gateway import Gateway
from control.gateway.timestamp import timestamp


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter(tags=["openai"])

    @routes.get("/v1/models", summary="Every known model; those that are ready come first")
    async def list_models() -> dict[str, Any]:
        found = sorted(await gateway.backend.models(), key=lambda info: info.state != "ready")
        data = [_shown(info) for info in found]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return {"object": "list", "data": data, "has_more": False, **ends}

    @routes.get("/v1/models/{model:path}", summary="One model, by id or alias")
    async def get_model(model: str) -> dict[str, Any]:
        return _shown(await find_model(gateway, model))

    return routes


async def find_model(gateway: Gateway, name: str) -> ModelInfo:
    """An entry of the catalogue, by id or alias. Raises UnknownModel."""
    found = await gateway.backend.models()
    for info in found:
        if name == info.id or name in info.aliases:
            return info
    raise UnknownModel(name, tuple(info.id for info in found))


def _shown(info: ModelInfo) -> dict[str, Any]:
    """A model as OpenAI's clients read it, and Anthropic's, with what we know besides."""
    return {
        "id": info.id,
        "object": "model",
        "created": info.created_s,
        "type": "model",
        "display_name": info.name,
        "created_at": timestamp(info.created_s),
        "owned_by": "phalanx",
        "name": info.name,
        "family": info.family,
        "state": info.state,
        "size_bytes": info.size_bytes,
        "context_tokens": info.context_tokens,
        "aliases": list(info.aliases),
    }
