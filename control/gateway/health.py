"""``/health`` says that the process answers, ``/health/ready`` that a chat would be answered."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter

from control.backend import Readiness
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter(tags=["service"])

    @routes.get("/health", summary="This process is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/health/ready", summary="Every ready instance gives tokens")
    async def ready() -> Json:
        if gateway.cluster is None:
            found = from_status(await gateway.backend.status())
        else:
            found = await gateway.cluster.readiness()
        if found.ready:
            return Json({"status": "ready"})
        wait_s = max(1, math.ceil(found.retry_after_s))
        body = {"status": "not_ready", "why": found.why}
        return Json(body, 503, headers={"Retry-After": str(wait_s)})

    return routes


def from_status(status: dict[str, Any]) -> Readiness:
    """Readiness as far as the status map tells it: an instance is ready, with all its ranks."""
    ready = [one for one in status["instances"] if one["state"] == "ready"]
    if not ready:
        return Readiness(False, "no instance is ready; load a model with `ctl model load`")
    for one in ready:
        for rank in one["ranks"]:
            if rank["state"] != "ready":
                where = f"rank {rank['rank']} of {one['id']}"
                return Readiness(False, f"{where} is {rank['state']}", retry_after_s=1.0)
    return Readiness(True)
