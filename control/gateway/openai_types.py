"""Bodies of OpenAI's chat and completions: every honoured field with its range, no other.

A field that is not here is refused by name. The fields of ``Inert`` cannot change the answer.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from control.gateway.ask import (
    INERT,
    MANY_TOKENS,
    Ask,
    Many,
    Metadata,
    ModelName,
    StopTexts,
    Text,
    at_most,
    only,
    refused,
)
from control.gateway.sampling import Sampling

MAX_CHOICES = 128
MAX_BIASES = 1024


class Inert(Ask):
    """Fields that clients send and that cannot change the answer: accepted, without effect."""

    user: str | None = Field(None, description=INERT)
    metadata: Metadata | None = Field(None, description=INERT)
    safety_identifier: str | None = Field(None, description=INERT)
    prompt_cache_key: str | None = Field(None, description=INERT)
    prompt_cache_retention: Annotated[str | None, only("in_memory", "24h")] = Field(
        None, description=INERT
    )
    store: Annotated[bool | None, only(False)] = Field(None, description=INERT)
    service_tier: Annotated[str | None, only("auto", "default")] = Field(None, description=INERT)


class StreamOptions(Ask):
    include_usage: bool = False
    include_obfuscation: Annotated[bool | None, only(False)] = Field(None, description=INERT)


Bias = Annotated[float, Field(ge=-100, le=100)]


class Generation(Inert):
    """What chat and text completions have in common."""

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=MANY_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0 keeps every token")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: StopTexts | None = Field(None, description="a string, or a list of up to 4")
    logit_bias: Annotated[dict[str, Bias] | None, at_most(MAX_BIASES)] = Field(
        None, description="token id to bias"
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> Sampling:
        """How its tokens are drawn."""
        return Sampling(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
        )


class TextPart(Ask):
    type: Annotated[
        Literal["text"], only("text", why="; images, audio and files are never fetched or read")
    ]
    text: Text


class Message(Ask):
    """One turn. ``developer`` is the newer name of ``system``."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        only("system", "developer", "user", "assistant"),
    ]
    content: Text | Many[TextPart]

    @property
    def text(self) -> str:
        """The whole text; parts are joined without a separator, as they are one turn."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """Body of ``POST /v1/chat/completions``."""

    messages: Many[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MANY_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: Annotated[str | None, only("none")] = Field(None, description=INERT)
    parallel_tool_calls: bool | None = Field(None, description=f"{INERT} without tools")
    response_format: Annotated[dict[str, str] | None, only({"type": "text"})] = None
    modalities: Annotated[list[str] | None, only(["text"])] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "only allowed when logprobs is true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise refused("max_tokens", "contradicts max_completion_tokens; send one of them")
        return self


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class CompletionRequest(Generation):
    """Body of ``POST /v1/completions``."""

    prompt: Text | Many[Text] | Many[TokenId] | Many[Many[TokenId]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, description="must equal n")

    @model_validator(mode="after")
    def _check_pairs(self) -> CompletionRequest:
        num_prompts = 1
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            num_prompts = len(self.prompt)
        if num_prompts * self.n > MAX_CHOICES:
            why = f"{num_prompts} prompts times n are more than {MAX_CHOICES} choices"
            raise refused("prompt", why)
        if self.best_of is not None and self.best_of != self.n:
            raise refused("best_of", "must equal n: this server ranks no candidates")
        if self.echo and self.logprobs is not None:
            raise refused("echo", "not with logprobs: prompt tokens are not scored")
        return self
