"""Ollama's objects for the answer to one request, whole or in lines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from control.backend import OpenModel
from control.gateway import choices, ndjson
from control.gateway.gateway import Gateway
from control.gateway.generation_text import Delta, chat_logprobs
from control.gateway.ollama_types import OllamaGeneration
from control.gateway.timestamp import timestamp


@dataclass(frozen=True, slots=True)
class Times:
    """When a request came and when its prompt was ready, by the gateway's monotonic clock."""

    arrived_s: float
    opened_s: float


class OllamaShape:
    """Ollama's answers: ``message`` for a chat, ``response`` for a prompt."""

    def __init__(
        self,
        gateway: Gateway,
        opened: OpenModel,
        body: OllamaGeneration,
        prompt_tokens: int,
        times: Times,
        *,
        is_chat: bool,
    ) -> None:
        self._settings, self._times, self._is_chat = gateway.settings, times, is_chat
        self._model, self._table = opened.id, opened.tokenizer
        self._want_logprobs = body.logprobs
        self._prompt_tokens = prompt_tokens

    def whole(self, answers: Sequence[choices.Answer]) -> dict[str, Any]:
        """The answer as one object."""
        (answer,) = answers
        return {**self._part(answer.delta), **self._end(answer)}

    async def frames(
        self, pieces: AsyncGenerator[choices.Piece, None]
    ) -> AsyncGenerator[bytes, None]:
        """A line for each piece of text; the last one has no text, but the counts and times."""
        async with aclosing(pieces):
            async for piece in pieces:
                if piece.delta.text or piece.delta.tokens:
                    yield ndjson.line({**self._part(piece.delta), "done": False})
                if piece.finish is not None:
                    yield ndjson.line({**self._part(Delta()), **self._end(piece)})

    def _part(self, delta: Delta) -> dict[str, Any]:
        head = {"model": self._model, "created_at": timestamp(self._settings.now_s())}
        shown = {**head, **said(self._is_chat, delta.text)}
        if self._want_logprobs and delta.tokens:
            shown["logprobs"] = chat_logprobs(delta.tokens, self._table)["content"]
        return shown

    def _end(self, last: choices.Answer | choices.Piece) -> dict[str, Any]:
        end_s = self._settings.monotonic_s()
        first_s = end_s if last.first_token_s is None else last.first_token_s
        return {
            "done": True,
            "done_reason": last.finish,
            "total_duration": _nanoseconds(end_s - self._times.arrived_s),
            "load_duration": _nanoseconds(self._times.opened_s - self._times.arrived_s),
            "prompt_eval_count": self._prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first_s - self._times.opened_s),
            "eval_count": last.completion_tokens,
            "eval_duration": _nanoseconds(end_s - first_s),
        }


def said(is_chat: bool, text: str) -> dict[str, Any]:
    """Where a text stands in the answer to a chat, or to a prompt."""
    return {"message": {"role": "assistant", "content": text}} if is_chat else {"response": text}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
