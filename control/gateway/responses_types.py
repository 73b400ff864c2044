"""Body of OpenAI's ``/v1/responses``: every honoured field with its range, no other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from control.gateway.ask import (
    INERT,
    MANY_TOKENS,
    Ask,
    Many,
    Metadata,
    ModelName,
    Text,
    only,
    refused,
)
from control.gateway.sampling import Sampling
from control.gateway.turn import Turn

LOGPROBS = "message.output_text.logprobs"
NO_FILES = "; images, audio and files are never fetched or read"


class InputPart(Ask):
    """A text of a turn; answers may be sent back as they came."""

    type: Annotated[
        Literal["input_text", "output_text"], only("input_text", "output_text", why=NO_FILES)
    ]
    text: Text
    logprobs: list[Any] | None = Field(None, description=INERT)


class InputItem(Ask):
    """One turn of the input. Items without a type are messages."""

    type: Annotated[Literal["message"], only("message")] = "message"
    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        only("system", "developer", "user", "assistant"),
    ]
    content: Text | Many[InputPart]
    id: str | None = Field(None, description=INERT)
    status: str | None = Field(None, description=INERT)

    @property
    def turn(self) -> Turn:
        """The turn; its parts are joined without a separator."""
        if isinstance(self.content, str):
            return Turn(self.role, self.content)
        return Turn(self.role, "".join(part.text for part in self.content))


class TextConfig(Ask):
    format: Annotated[dict[str, str] | None, only({"type": "text"})] = None


class ResponseStreamOptions(Ask):
    include_obfuscation: Annotated[bool | None, only(False)] = Field(None, description=INERT)


class ResponsesRequest(Ask):
    """Body of ``POST /v1/responses``."""

    model: ModelName
    input: Text | Annotated[Many[InputItem], Field(min_length=1)] = Field(
        description="a text of the user, or turns"
    )
    instructions: Text | None = Field(
        None, description="the system's turn; not carried over by previous_response_id"
    )
    previous_response_id: str | None = Field(
        None, max_length=128, description="go on after a response that this node still keeps"
    )
    store: bool = Field(True, description="keep it for previous_response_id, in memory, for a time")
    max_output_tokens: int | None = Field(None, ge=1, le=MANY_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    include: Annotated[list[str] | None, only([LOGPROBS])] = Field(
        None, description=f"only {LOGPROBS}"
    )
    top_logprobs: int | None = Field(None, ge=0, le=20)
    text: TextConfig | None = None
    truncation: Annotated[str | None, only("disabled")] = None
    background: Annotated[bool | None, only(False)] = None
    tool_choice: Annotated[str | None, only("none")] = Field(None, description=INERT)
    parallel_tool_calls: bool | None = Field(None, description=f"{INERT} without tools")
    metadata: Metadata | None = Field(None, description=f"{INERT}; given back")
    user: str | None = Field(None, description=INERT)
    safety_identifier: str | None = Field(None, description=INERT)
    prompt_cache_key: str | None = Field(None, description=INERT)
    prompt_cache_retention: Annotated[str | None, only("in_memory", "24h")] = Field(
        None, description=INERT
    )
    service_tier: Annotated[str | None, only("auto", "default")] = Field(None, description=INERT)

    @model_validator(mode="after")
    def _check_pairs(self) -> ResponsesRequest:
        if self.top_logprobs is not None and not self.include:
            raise refused("top_logprobs", f"only allowed when include has {LOGPROBS!r}")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "only allowed when stream is true")
        return self

    @property
    def turns(self) -> list[Turn]:
        """The turns of the input."""
        if isinstance(self.input, str):
            return [Turn("user", self.input)]
        return [item.turn for item in self.input]

    @property
    def logprobs(self) -> int | None:
        """Alternatives wanted beside each token; None where no log-probabilities are."""
        return (self.top_logprobs or 0) if self.include else None

    @property
    def sampling(self) -> Sampling:
        """How its tokens are drawn."""
        return Sampling(temperature=self.temperature, top_p=self.top_p)
