"""What the answers of OpenAI's chat and completions have in common."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from control.backend import OpenModel
from control.gateway import choices, sse
from control.gateway.gateway import Gateway
from control.gateway.generation_text import usage
from control.gateway.openai_types import Generation


class OpenAiShape:
    """Head, usage and the order of chunks; a subclass has the choices.

    Attributes:
        object_name: ``object`` of a whole answer; that of a chunk is ``chunk_name``.
    """

    id_prefix: str
    object_name: str
    chunk_name: str

    def __init__(
        self,
        gateway: Gateway,
        opened: OpenModel,
        body: Generation,
        prompts: Sequence[tuple[int, ...]],
    ) -> None:
        self.table = opened.tokenizer
        self._prompt_tokens = sum(len(ids) for ids in prompts)
        self._include_usage = body.include_usage
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(gateway.settings.now_s()),
            "model": opened.id,
        }

    def choice(self, index: int, answer: choices.Answer) -> dict[str, Any]:
        """One choice of a whole answer."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a streamed choice begins with."""
        raise NotImplementedError

    def chunks(self, piece: choices.Piece) -> Iterator[dict[str, Any]]:
        """The choice objects of one piece of a stream."""
        raise NotImplementedError

    def whole(self, answers: Sequence[choices.Answer]) -> dict[str, Any]:
        """The answer as one object."""
        shown = [self.choice(index, answer) for index, answer in enumerate(answers)]
        tokens = sum(answer.completion_tokens for answer in answers)
        used = usage(self._prompt_tokens, tokens)
        return {**self._head, "object": self.object_name, "choices": shown, "usage": used}

    async def frames(
        self, pieces: AsyncGenerator[choices.Piece, None]
    ) -> AsyncGenerator[bytes, None]:
        """The answer as chunks; the last one has the usage, if that was asked for."""
        tokens: dict[int, int] = {}
        async with aclosing(pieces):
            async for piece in pieces:
                opening = None if piece.choice in tokens else self.opening(piece.choice)
                tokens[piece.choice] = piece.completion_tokens
                if opening is not None:
                    yield self._chunk([opening])
                for shown in self.chunks(piece):
                    yield self._chunk([shown])
        if self._include_usage:
            yield self._chunk([], usage(self._prompt_tokens, sum(tokens.values())))
        yield sse.DONE

    def _chunk(self, shown: list[dict[str, Any]], used: dict[str, int] | None = None) -> bytes:
        extra = {"usage": used} if self._include_usage else {}
        return sse.frame({**self._head, "object": self.chunk_name, "choices": shown, **extra})
