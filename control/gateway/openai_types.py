"""Request bodies of the OpenAI routes: every honoured field with its range, and nothing else.

A field that is not here is refused by name. ``null`` and an empty list ask for nothing,
so they are taken for absent. The fields of ``Inert`` cannot change the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

SEED_MODULUS = 2**64  # the engine's generator is keyed by 64 bits
MAX_CHOICES = 128
MAX_UNKNOWN = 32
MAX_BIASES = 1024
MAX_METADATA = 16  # OpenAI's own limit


def refused(param: str, why: str) -> PydanticCustomError:
    """The fault of one field that only the whole body shows."""
    return PydanticCustomError("not_supported", "{why}", {"param": param, "why": why})


def _only(*allowed: Any, why: str = "") -> BeforeValidator:
    """Refuse, at the field itself, every value but these."""

    def check(value: Any) -> Any:
        if any(value == one and type(value) is type(one) for one in allowed):
            return value
        shown = " or ".join(repr(one) for one in allowed)
        context = {"why": f"only {shown} is supported{why}"}
        raise PydanticCustomError("not_supported", "{why}", context)

    return BeforeValidator(check)


def _at_most(count: int) -> BeforeValidator:
    """Refuse a larger object before its entries are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            context = {"why": f"at most {count} entries are taken, this has {len(value)}"}
            raise PydanticCustomError("too_many", "{why}", context)
        return value

    return BeforeValidator(check)


class Ask(BaseModel):
    """Base of every request object: strict types, no unknown field, null asks for nothing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [name for name in data if name not in cls.model_fields]
            if len(unknown) > MAX_UNKNOWN:  # a million of them would be a million error objects
                raise refused(str(unknown[0])[:64], f"{len(unknown)} fields are not honoured")
            return {name: value for name, value in data.items() if value not in (None, [])}
        return data


class Inert(Ask):
    """Fields that clients send and that cannot change the answer: accepted, without effect."""

    user: str | None = None
    metadata: Annotated[dict[str, str] | None, _at_most(MAX_METADATA)] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Annotated[bool | None, _only(False)] = None
    service_tier: Annotated[str | None, _only("auto", "default")] = None


class StreamOptions(Ask):
    include_usage: bool = False
    include_obfuscation: Annotated[bool | None, _only(False)] = None


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_text", "holds half a surrogate pair") from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[Text, Field(min_length=1, max_length=1024)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _stop_form(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Generation(Inert):
    """What chat and text completions have in common."""

    model: str = Field(min_length=1, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0 keeps every token")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: Annotated[list[StopText], BeforeValidator(_stop_form), Field(max_length=4)] | None = (
        Field(None, description="a string, or a list of up to 4")
    )
    logit_bias: Annotated[dict[str, Bias] | None, _at_most(MAX_BIASES)] = Field(
        None, description="token id to bias"
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "only allowed when stream is true")
        return self


class TextPart(Ask):
    type: Annotated[
        Literal["text"], _only("text", why="; images, audio and files are never fetched or read")
    ]
    text: Text


class Message(Ask):
    """One turn. ``developer`` is the newer name of ``system``."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        _only("system", "developer", "user", "assistant"),
    ]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        """The whole text; parts are joined without a separator, as they are one turn."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: Annotated[str | None, _only("none")] = None
    parallel_tool_calls: bool | None = Field(None, description="without tools it asks for nothing")
    response_format: Annotated[dict[str, str] | None, _only({"type": "text"})] = None
    modalities: Annotated[list[str] | None, _only(["text"])] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "only allowed when logprobs is true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise refused("max_tokens", "contradicts max_completion_tokens; send one of them")
        return self


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]  # one fault is enough to know of a long list


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
