"""OpenAI's ``response`` object, and the sequence of events that streams it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from control.backend import OpenModel
from control.gateway import choices, sse
from control.gateway.gateway import Gateway
from control.gateway.generation_text import Delta, chat_logprobs
from control.gateway.json_response import Json
from control.gateway.response_store import Kept
from control.gateway.responses_types import ResponsesRequest
from control.gateway.stream import answer_to
from control.gateway.turn import Turn

WHERE = {"output_index": 0, "content_index": 0}  # one message with one text, always


class ResponseShape:
    """One response; it is kept for later ones when it has ended well and ``store`` is true.

    Args:
        turns: the conversation up to the answer, without the instructions.
        owner: id of the API key that asked.
    """

    def __init__(
        self,
        gateway: Gateway,
        opened: OpenModel,
        body: ResponsesRequest,
        turns: Sequence[Turn],
        prompt_tokens: int,
        request_id: str,
        owner: str,
    ) -> None:
        self._gateway, self._body, self._turns = gateway, body, tuple(turns)
        self._table = opened.tokenizer
        self._prompt_tokens = prompt_tokens
        self._request_id, self._owner = request_id, owner
        self._id = f"resp_{secrets.token_hex(24)}"
        self._item_id = f"msg_{secrets.token_hex(24)}"
        self._head = {
            "id": self._id,
            "object": "response",
            "created_at": int(gateway.settings.now_s()),
            "model": opened.id,
            **_echoed(body),
        }

    def whole(self, answers: Sequence[choices.Answer]) -> dict[str, Any]:
        """The response as one object, kept if it should be."""
        (answer,) = answers
        return self._ended(answer.delta, answer.finish, answer.completion_tokens)

    async def frames(
        self, pieces: AsyncGenerator[choices.Piece, None]
    ) -> AsyncGenerator[bytes, None]:
        """Every event from ``response.created`` to the response that ended, numbered from 0."""
        number = 0
        deltas: list[Delta] = []
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    for event in self._events(piece, deltas):
                        yield _frame(event, number)
                        number += 1
        except Exception as exc:
            if not number:
                raise  # nothing was sent: the error has a status
            error = answer_to(exc, self._request_id)
            shown = {"code": "server_error", "message": error.message}
            failed = self._shown("failed", error=shown)
            yield _frame({"type": "response.failed", "response": failed}, number)

    def _events(self, piece: choices.Piece, deltas: list[Delta]) -> Iterator[dict[str, Any]]:
        """Events of one piece; ``deltas`` collects the text."""
        if not deltas:
            shown = self._shown("in_progress")
            yield {"type": "response.created", "response": shown}
            yield {"type": "response.in_progress", "response": shown}
            item = self._item(None, "in_progress")
            yield {"type": "response.output_item.added", "output_index": 0, "item": item}
            yield {**self._at("content_part.added"), "part": self._part(Delta())}
        deltas.append(piece.delta)
        if piece.delta.text or piece.delta.tokens:
            logprobs = self._logprobs(piece.delta)
            yield {
                **self._at("output_text.delta"),
                "delta": piece.delta.text,
                "logprobs": logprobs,
            }
        if piece.finish is not None:
            whole = Delta.join(deltas)
            ended = self._ended(whole, piece.finish, piece.completion_tokens)
            part = self._part(whole)
            logprobs = self._logprobs(whole)
            yield {**self._at("output_text.done"), "text": whole.text, "logprobs": logprobs}
            yield {**self._at("content_part.done"), "part": part}
            (item,) = ended["output"]
            yield {"type": "response.output_item.done", "output_index": 0, "item": item}
            yield {"type": f"response.{ended['status']}", "response": ended}

    def _ended(self, delta: Delta, finish: str, completion_tokens: int) -> dict[str, Any]:
        cut = finish == "length"
        shown = self._shown(
            "incomplete" if cut else "completed",
            output=[self._item(delta, "incomplete" if cut else "completed")],
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            completed_at=None if cut else int(self._gateway.settings.now_s()),
            usage={
                "input_tokens": self._prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self._prompt_tokens + completion_tokens,
            },
        )
        if self._body.store:
            turns = (*self._turns, Turn("assistant", delta.text))
            self._gateway.responses.put(self._id, Kept(bytes(Json(shown).body), turns, self._owner))
        return shown

    def _shown(self, status: str, **fields: Any) -> dict[str, Any]:
        empty: dict[str, Any] = {
            "output": [],
            "error": None,
            "incomplete_details": None,
            "completed_at": None,
            "usage": None,
        }
        return {**self._head, "status": status, **empty, **fields}

    def _item(self, delta: Delta | None, status: str) -> dict[str, Any]:
        content = [] if delta is None else [self._part(delta)]
        head = {"id": self._item_id, "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": content}

    def _part(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta)
        return {
            "type": "output_text",
            "text": delta.text,
            "annotations": [],
            "logprobs": logprobs,
        }

    def _logprobs(self, delta: Delta) -> list[Any]:
        if self._body.logprobs is None:
            return []
        found: list[Any] = chat_logprobs(delta.tokens, self._table)["content"]
        return found

    def _at(self, event: str) -> dict[str, Any]:
        return {"type": f"response.{event}", "item_id": self._item_id, **WHERE}


def _echoed(body: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request, and what is fixed here."""
    return {
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "store": body.store,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "background": False,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "truncation": "disabled",
    }


def _frame(event: dict[str, Any], number: int) -> bytes:
    return sse.frame({**event, "sequence_number": number}, event=event["type"])
