"""Ollama's ``/api/tags``, ``show``, ``ps``, ``version``, ``pull`` and ``delete``."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from control.backend import ModelInfo, PullProgress
from control.gateway import ndjson
from control.gateway.cluster import control_of
from control.gateway.disconnect import until_disconnect
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json
from control.gateway.models import find_model
from control.gateway.ollama_types import DeleteRequest, PullRequest, ShowRequest
from control.gateway.timestamp import timestamp

UNKNOWN_TIME = "0001-01-01T00:00:00Z"  # Go's zero time, which Ollama's clients know
NEVER = "9999-12-31T23:59:59Z"
HERE = ("local", "loading", "ready", "failed")

ABOUT = (
    "A digest is of the model's name, not of its files. What the catalogue does not know is empty."
)


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter(tags=["ollama"])
    backend = gateway.backend

    @routes.get("/api/version", summary="Version of this server")
    async def get_version() -> Json:
        return Json({"version": _version()})

    @routes.get("/api/tags", summary="Models whose files are here", description=ABOUT)
    async def tags() -> Json:
        return Json({"models": [_entry(one) for one in await backend.models() if _is_here(one)]})

    @routes.post("/api/show", summary="One model")
    async def show(body: ShowRequest) -> Json:
        return Json(await _shown(gateway, await find_model(gateway, body.model)))

    @routes.get("/api/ps", summary="Running models")
    async def ps() -> Json:
        known = {info.id: info for info in await backend.models()}
        found = (await backend.status())["instances"]
        running = [one for one in found if one["state"] != "failed"]
        return Json({"models": [_running(one, known.get(one["model"])) for one in running]})

    @routes.post("/api/pull", summary="Download a model, with progress")
    async def pull(body: PullRequest, request: Request) -> Response:
        progress = control_of(gateway).pull(body.model)
        if body.stream:
            write_timeout_s = gateway.settings.write_timeout_s
            return ndjson.LineStream(_lines(progress), write_timeout_s=write_timeout_s)
        await until_disconnect(request.receive, _until_done(progress))
        return Json({"status": "success"})

    @routes.delete("/api/delete", summary="Delete a model's files from this machine")
    async def delete(body: DeleteRequest) -> Json:
        await control_of(gateway).remove(body.model)
        return Json({"status": "success"})

    return routes


def _version() -> str:
    try:
        return version("phalanx")
    except PackageNotFoundError:  # run from a tree that was never installed
        return "0.0.0"


def _is_here(info: ModelInfo) -> bool:
    return info.state in HERE


def _entry(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": info.id,
        "model": info.id,
        "modified_at": timestamp(info.created_s) if info.created_s else UNKNOWN_TIME,
        "size": info.size_bytes,
        "digest": _digest(info.id),
        "details": _details(info.family),
    }


def _digest(model: str) -> str:
    """Ollama's clients tell models apart by a SHA-256; this one is of the name, not of files."""
    return hashlib.sha256(model.encode()).hexdigest()


def _details(family: str) -> dict[str, Any]:
    """What the catalogue does not know is empty."""
    return {
        "parent_model": "",
        "format": "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": "",
        "quantization_level": "",
    }


async def _shown(gateway: Gateway, info: ModelInfo) -> dict[str, Any]:
    """``show``; the template is only known of a model that is ready: none is loaded for this."""
    template = None
    if info.state == "ready":
        opened = await gateway.backend.open_model(
            info.id, timeout_s=gateway.settings.open_timeout_s
        )
        template = opened.chat_template
    known = {
        "general.architecture": info.family,
        "general.basename": info.name,
        f"{info.family or 'general'}.context_length": info.context_tokens,
    }
    return {
        "modelfile": "",
        "parameters": "",
        "template": template or "",
        "details": _details(info.family),
        "model_info": known,
        "capabilities": ["completion"],
        "modified_at": timestamp(info.created_s) if info.created_s else UNKNOWN_TIME,
    }


def _running(instance: dict[str, Any], info: ModelInfo | None) -> dict[str, Any]:
    ranks = instance["ranks"]
    size = sum(rank.get("memory_bytes") or 0 for rank in ranks)
    on_gpu = [rank for rank in ranks if not str(rank.get("device", "")).startswith("cpu")]
    model = instance["model"]
    return {
        "name": model,
        "model": model,
        "size": size,
        "size_vram": sum(rank.get("memory_bytes") or 0 for rank in on_gpu),
        "digest": _digest(model),
        "details": _details(info.family if info else ""),
        "expires_at": NEVER,
        "context_length": instance.get("context_tokens") or (info.context_tokens if info else 0),
    }


async def _lines(progress: AsyncIterator[PullProgress]) -> AsyncGenerator[bytes, None]:
    """Ollama's lines of a pull; a source stands for what it calls a layer."""
    begun = False
    async for now in progress:
        if not begun:  # what is refused at once has a status
            begun = True
            yield ndjson.line({"status": "pulling manifest"})
        match now.phase:
            case "done":
                yield ndjson.line({"status": "success"})
            case "downloading":
                line = {"status": f"pulling {now.source}", "digest": _digest(now.source)}
                sizes = {"total": now.total_bytes, "completed": now.done_bytes}
                yield ndjson.line({**line, **sizes})
            case phase:
                yield ndjson.line({"status": phase})


async def _until_done(progress: AsyncIterator[PullProgress]) -> None:
    async for _ in progress:
        pass
