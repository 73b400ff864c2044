"""Bodies of Anthropic's messages: every honoured field with its range, no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from control.gateway.ask import INERT, MANY_TOKENS, Ask, Many, ModelName, StopText, Text, only
from control.gateway.sampling import Sampling
from control.gateway.turn import Turn

MAX_STOPS = 64


class CacheControl(Ask):
    type: Annotated[Literal["ephemeral"], only("ephemeral")]
    ttl: Annotated[str | None, only("5m", "1h")] = None


class TextBlock(Ask):
    type: Annotated[
        Literal["text"],
        only("text", why="; images, documents and tools are not, and nothing is fetched"),
    ]
    text: Text
    cache_control: CacheControl | None = Field(None, description=INERT)


Content = Text | Many[TextBlock]


class AnthropicTurn(Ask):
    """One turn; turns of the same role that follow each other are one."""

    role: Annotated[Literal["user", "assistant", "system"], only("user", "assistant", "system")]
    content: Content


class UserMetadata(Ask):
    user_id: str | None = None


class CountTokensRequest(Ask):
    """Body of ``POST /v1/messages/count_tokens``: what makes a prompt."""

    model: ModelName
    messages: Many[AnthropicTurn] = Field(
        min_length=1, description="an assistant's turn at the end is continued"
    )
    system: Content | None = None
    thinking: Annotated[dict[str, str] | None, only({"type": "disabled"})] = None
    tool_choice: Annotated[dict[str, str] | None, only({"type": "none"})] = Field(
        None, description=INERT
    )
    cache_control: CacheControl | None = Field(None, description=INERT)
    speed: Annotated[str | None, only("standard")] = Field(None, description=INERT)

    @property
    def turns(self) -> list[Turn]:
        """The conversation, beginning with the system's turn if there is one."""
        turns = [Turn("system", _text(self.system))] if self.system is not None else []
        for message in self.messages:
            text = _text(message.content)
            if turns and turns[-1].role == message.role:
                text = f"{turns.pop().text}\n{text}"
            turns.append(Turn(message.role, text))
        return turns


class MessagesRequest(CountTokensRequest):
    """Body of ``POST /v1/messages``."""

    max_tokens: int = Field(ge=1, le=MANY_TOKENS)
    stream: bool = False
    stop_sequences: Annotated[Many[StopText] | None, Field(max_length=MAX_STOPS)] = None
    temperature: float = Field(1.0, ge=0, le=1)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0 keeps every token")
    metadata: UserMetadata | None = Field(None, description=INERT)
    service_tier: Annotated[str | None, only("auto", "standard_only")] = Field(
        None, description=INERT
    )

    @property
    def sampling(self) -> Sampling:
        """How its tokens are drawn."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


def _text(content: str | Sequence[TextBlock]) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content)
