"""``/cluster``: what operators see of the cluster, and the four things they tell it to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from control.backend import ClusterControl, ClusterEvent, LoadOptions
from control.gateway import sse
from control.gateway.ask import Ask
from control.gateway.errors import ApiError
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json

Name = Annotated[str, Field(min_length=1, max_length=1024)]
Share = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
KEEP_ALIVE_S = 15.0  # a comment this often shows a feed to be alive where nothing happens


class PlaceRequest(Ask):
    """Body of ``place`` and ``load``: without options the cluster chooses."""

    model: Name
    tensor: int | None = Field(None, ge=1, le=1024)
    pipeline: int | None = Field(None, ge=1, le=1024)
    shares: list[Share] | None = Field(None, max_length=1024)
    experts: Literal["inside", "across"] | None = None
    engine: Literal["torch", "mlx"] | None = None
    context: int | None = Field(None, ge=1, le=2**31 - 1)
    slots: int | None = Field(None, ge=1, le=65536)
    threads: int | None = Field(None, ge=1, le=4096)
    device: Annotated[str, Field(min_length=1, max_length=16)] | None = None
    goal: Literal["latency", "throughput"] | None = None
    replicas: int | None = Field(None, ge=1, le=16)
    priority: int | None = Field(None, ge=-100, le=100)

    @property
    def options(self) -> LoadOptions:
        """The shape asked for."""
        return LoadOptions(
            tensor=self.tensor,
            pipeline=self.pipeline,
            shares=tuple(self.shares or ()),
            experts=self.experts,
            engine=self.engine,
            context_tokens=self.context,
            slots=self.slots,
            threads=self.threads,
            device=self.device,
            goal=self.goal,
            replicas=self.replicas,
            priority=self.priority,
        )


class UnloadRequest(Ask):
    id: Name


class SwapRequest(Ask):
    old: Name
    new: Name


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter(prefix="/cluster", tags=["cluster"])
    backend = gateway.backend

    @routes.get("/status", summary="Cluster, nodes and instances")
    async def status() -> Json:
        return Json(await backend.status())

    @routes.get("/nodes", summary="The machines")
    async def nodes() -> Json:
        return Json((await backend.status())["nodes"])

    @routes.get("/instances", summary="The running models")
    async def instances() -> Json:
        return Json((await backend.status())["instances"])

    @routes.get("/topology", summary="Links with measured latency and bandwidth")
    async def topology() -> Json:
        return Json(await control_of(gateway).topology())

    @routes.get("/tree", summary="Live supervision tree with restart counts")
    async def tree() -> Json:
        return Json(await control_of(gateway).tree())

    @routes.get("/events", summary="Feed of changes; the first event is the status")
    async def events(request: Request) -> Response:
        frames = _events(gateway, control_of(gateway), request.state.key_id)
        return sse.EventStream(frames, write_timeout_s=gateway.settings.write_timeout_s)

    @routes.post("/place", summary="Dry run: which placement, and why not another")
    async def place(body: PlaceRequest) -> Json:
        return Json(await control_of(gateway).place(body.model, body.options))

    @routes.post("/load", summary="Place and load a model")
    async def load(body: PlaceRequest) -> Json:
        return Json({"id": await control_of(gateway).load(body.model, body.options)})

    @routes.post("/unload", summary="Drain and unload an instance")
    async def unload(body: UnloadRequest) -> Json:
        await control_of(gateway).unload(body.id)
        return Json({"id": body.id})

    @routes.post("/swap", summary="Replace a model without a failed request")
    async def swap(body: SwapRequest) -> Json:
        return Json({"id": await control_of(gateway).swap(body.old, body.new)})

    return routes


def control_of(gateway: Gateway) -> ClusterControl:
    """What operators steer. Raises ApiError 503 where no cluster is attached."""
    if gateway.cluster is None:
        raise ApiError(
            503,
            "this gateway is attached to no cluster it could steer; ask another node.",
            code="no_cluster",
            headers={"Retry-After": "5"},
        )
    return gateway.cluster


async def _events(
    gateway: Gateway, cluster: ClusterControl, key_id: str
) -> AsyncGenerator[bytes, None]:
    """Frames of the feed, until the client leaves, its key ends, or the server drains."""
    source = cluster.events()
    ring = gateway.ring
    stopping = asyncio.ensure_future(gateway.stopping.wait())
    keys = asyncio.ensure_future(ring.next_change.wait())
    coming: asyncio.Future[ClusterEvent] | None = None
    try:
        coming = asyncio.ensure_future(anext(source))  # subscribed before the status is taken
        yield sse.frame(await gateway.backend.status(), event="status")
        while not stopping.done():
            all_ = {coming, stopping, keys}
            await asyncio.wait(all_, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
            if not ring.still_admits(key_id):
                return
            if keys.done():  # asked for before anything else happens: none is missed
                keys = asyncio.ensure_future(ring.next_change.wait())
            if not coming.done():
                if not stopping.done():
                    yield b": keep-alive\n\n"
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            yield sse.frame(dict(event.data), event=event.kind)
            coming = asyncio.ensure_future(anext(source))
    finally:
        waiting = [task for task in (stopping, keys, coming) if task is not None]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        aclose = getattr(source, "aclose", None)
        if aclose is not None:
            await aclose()
