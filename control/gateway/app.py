"""Builds the HTTP surface: routes, limits and error answers in front of one backend."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from control.backend import Backend, ClusterControl
from control.errors import ControlError
from control.gateway import (
    anthropic,
    chat,
    cluster,
    completions,
    docs,
    embeddings,
    errors,
    health,
    keys,
    models,
    ollama,
    ollama_models,
    responses,
)
from control.gateway.auth import Guard
from control.gateway.edge import Edge
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json
from control.gateway.key_ring import KeyRing
from control.gateway.limits import BodyLimit
from control.gateway.metrics import Metrics
from control.gateway.settings import GatewaySettings

ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    models.router,
    embeddings.router,
    anthropic.router,
    ollama.router,
    ollama_models.router,
    cluster.router,
    keys.router,
    health.router,
)


def create_app(
    backend: Backend,
    *,
    settings: GatewaySettings | None = None,
    control: ClusterControl | None = None,
    ring: KeyRing | None = None,
) -> FastAPI:
    """The gateway of one node.

    Args:
        backend: serves models.
        control: answers the ``/cluster`` routes beyond the status; without it they say 503.
        ring: whom to let in; without it, everybody.

    Returns:
        An app whose ``state.gateway`` is the ``Gateway`` its routes share.
    """
    settings = settings or GatewaySettings()
    ring = ring or KeyRing()
    gateway = Gateway(backend, control, settings, Metrics(settings.registry), ring)
    app = FastAPI(
        title="Phalanx",
        summary="A fault-tolerant LLM server",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": errors.DESCRIBED, "5XX": errors.DESCRIBED},
    )
    app.state.gateway = gateway
    for router in ROUTERS:
        app.include_router(router(gateway))
    app.include_router(gateway.metrics.router())
    app.include_router(docs.router(app))
    for kind in (errors.ApiError, errors.GenerationFailed, RequestValidationError, ControlError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(
        BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.receive_timeout_s
    )
    app.add_middleware(Guard, ring=ring, origins=settings.cors_origins)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(Edge, settings=settings, metrics=gateway.metrics)
    return app


async def _answer(request: Request, exc: Exception) -> Json:
    error = errors.from_exception(exc)
    assert error is not None, f"{type(exc).__name__} is registered without an answer"
    return errors.response_for(request.url.path, error)


async def _answer_http(request: Request, exc: Exception) -> Json:
    """Starlette's own refusals: an unknown route, a wrong method, an unreadable body."""
    assert isinstance(exc, HTTPException)
    where = f"{request.method} {request.url.path}"
    text, code = {
        404: (f"no such route: {where}. See /docs.", "route_not_found"),
        405: (f"{where} is not allowed; the Allow header names what is.", "method_not_allowed"),
        400: ("the body is not valid JSON in UTF-8.", "invalid_json"),
    }.get(exc.status_code, (str(exc.detail), None))
    error = errors.ApiError(exc.status_code, text, code=code, headers=exc.headers)
    return errors.response_for(request.url.path, error)
