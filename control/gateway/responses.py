"""``/v1/responses``: OpenAI's newer API, with the conversations that a node keeps for it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from control.backend import OpenModel
from control.gateway import prompts, serve, sse
from control.gateway.errors import ApiError
from control.gateway.gateway import Gateway
from control.gateway.json_response import Json
from control.gateway.response_shape import ResponseShape
from control.gateway.response_store import Kept
from control.gateway.responses_types import ResponsesRequest
from control.gateway.turn import Turn

ABOUT = (
    "A response is kept for previous_response_id unless store is false: the latest 1000, with at "
    "most 64 MiB of text in all, in the memory of this node alone and until it restarts. "
    "Only the API key that made it reads it. Instructions are not carried over. Tools, reasoning, "
    "files, conversations and background work are refused by name. The events of a stream are "
    "numbered and end with response.completed, response.incomplete or response.failed."
)


def router(gateway: Gateway) -> APIRouter:
    """The routes, served by ``gateway``."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/responses", summary="Answer, and keep the conversation", description=ABOUT)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        turns = [*_earlier(gateway, body, request.state.key_id), *body.turns]
        told = [] if body.instructions is None else [Turn("system", body.instructions)]

        async def encode(opened: OpenModel) -> serve.Prompts:
            return [await prompts.chat_prompt(opened, [*told, *turns], param="input")]

        opened, encoded = await serve.prepare(gateway, request, body.model, encode)
        requests = prompts.plan(
            gateway,
            opened,
            body.sampling,
            encoded,
            param="input",
            max_tokens=body.max_output_tokens,
            logprobs=body.logprobs,
            request_id=request.state.request_id,
        )
        asked = serve.Asked(opened, requests)
        state = request.state
        num_tokens = len(encoded[0])
        shape = ResponseShape(
            gateway, opened, body, turns, num_tokens, state.request_id, state.key_id
        )
        stream = sse.EventStream if body.stream else None
        return await serve.answer(gateway, request, asked, shape, stream=stream)

    @routes.get("/v1/responses/{id}", summary="A response that is still kept")
    async def get_response(id: str, request: Request) -> Response:
        kept = gateway.responses.get(id, request.state.key_id)
        if kept is None:
            raise _gone(id, status=404, param="id")
        return Response(kept.shown, media_type="application/json")

    @routes.delete("/v1/responses/{id}", summary="Forget a response")
    async def delete_response(id: str, request: Request) -> Json:
        if not gateway.responses.remove(id, request.state.key_id):
            raise _gone(id, status=404, param="id")
        return Json({"id": id, "object": "response", "deleted": True})

    return routes


def _earlier(gateway: Gateway, body: ResponsesRequest, owner: str) -> tuple[Turn, ...]:
    """The conversation that the body goes on with."""
    if body.previous_response_id is None:
        return ()
    kept: Kept | None = gateway.responses.get(body.previous_response_id, owner)
    if kept is None:
        raise _gone(body.previous_response_id, status=400, param="previous_response_id")
    return kept.turns


def _gone(id: str, *, status: int, param: str) -> ApiError:
    return ApiError(
        status,
        f"{param}: response {id[:64]!r} is not kept here. A node keeps the latest ones in memory, "
        "unless store is false; send the whole conversation as input.",
        param=param,
        code="previous_response_not_found" if status == 400 else "response_not_found",
    )
