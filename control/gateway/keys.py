"""``/cluster/keys``: make, list and revoke API keys, for who has one with the scope ``admin``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field

from control.gateway.ask import Ask, Text
from control.gateway.cluster import control_of
from control.gateway.errors import ApiError
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json
from control.keys import MAX_NAME, MAX_PER_MINUTE, BadKey, make_key

MAX_EXPIRES_S = 2**33

ABOUT = (
    "The key is in this answer alone: keep it. The scopes stand each for itself. The first key of "
    "a cluster is made by `ctl key create`."
)


class KeyRequest(Ask):
    """Body of ``POST /cluster/keys``."""

    name: Annotated[Text, Field(max_length=MAX_NAME)] = ""
    scopes: Annotated[list[Literal["infer", "admin"]], Field(max_length=2)] | None = None
    rate_per_minute: int | None = Field(None, ge=1, le=MAX_PER_MINUTE)
    expires_s: int | None = Field(
        None, ge=1, le=MAX_EXPIRES_S, description="seconds since 1970; without it, never"
    )


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter(prefix="/cluster/keys", tags=["cluster"])

    @routes.get("", summary="The API keys, without what opens anything")
    async def list_keys() -> Json:
        return Json(await control_of(gateway).keys())

    @routes.post("", summary="Make an API key", description=ABOUT)
    async def create(body: KeyRequest) -> Json:
        if gateway.ring.is_open:
            text = (
                "who is let in without a key makes none: run `ctl key create` on a machine of the "
                "cluster for the first one."
            )
            raise ApiError(403, text, code="first_key_by_ctl")
        now_s = gateway.settings.now_s()
        try:
            key, record = make_key(
                now_s,
                name=body.name,
                scopes=body.scopes or ("infer",),
                rate_per_minute=body.rate_per_minute or 0,
                expires_s=body.expires_s or 0,
            )
        except BadKey as exc:
            raise ApiError(400, str(exc), code=exc.kind, param=str(exc).partition(":")[0]) from exc
        await control_of(gateway).add_key(record)
        shown: dict[str, Any] = {**record.public(now_s), "key": key}
        return Json(shown)

    @routes.delete("/{id}", summary="Revoke an API key on every node")
    async def revoke(id: str) -> Json:
        await control_of(gateway).revoke_key(id)
        return Json({"id": id, "revoked": True})

    return routes
