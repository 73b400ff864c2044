"""Bodies of Ollama's API: every honoured field with its range, no other.

An empty text asks for nothing where Ollama's own clients send one by default.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from control.gateway.ask import (
    INERT,
    MANY_TOKENS,
    Ask,
    Many,
    ModelName,
    StopTexts,
    Text,
    only,
    refused,
)
from control.gateway.sampling import Sampling
from control.gateway.turn import Turn

LATEST = ":latest"
_DURATION = re.compile(r"-?((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))+|-?\d+")


def _plain_name(name: str) -> str:
    """Ollama's tag for a model without one names nothing here."""
    return name.removesuffix(LATEST) or name


def _duration(value: Any) -> Any:
    if isinstance(value, str) and not _DURATION.fullmatch(value):
        raise PydanticCustomError("bad_duration", "must be seconds or a text such as '5m'")
    return value


def _some(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("no_tokens", "must be at least 1; -1 takes the room there is")
    return value


OllamaName = Annotated[ModelName, AfterValidator(_plain_name)]
KeepAlive = Annotated[float | str, AfterValidator(_duration)]


class Options(Ask):
    """Sampling, with Ollama's own defaults, and what only sets how a machine is used."""

    temperature: float = Field(0.8, ge=0, le=100)
    top_k: int = Field(40, ge=0, le=2**31 - 1)
    top_p: float = Field(0.9, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    num_predict: Annotated[int, Field(ge=-2, le=MANY_TOKENS), AfterValidator(_some)] | None = None
    num_ctx: int | None = Field(None, ge=1, le=MANY_TOKENS)
    stop: StopTexts | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repeat_penalty: Annotated[float | None, only(1, 1.0)] = None
    typical_p: Annotated[float | None, only(1, 1.0)] = None
    tfs_z: Annotated[float | None, only(1, 1.0)] = None
    mirostat: Annotated[int | None, only(0)] = None
    num_keep: int | None = Field(None, description=INERT)
    num_batch: int | None = Field(None, description=INERT)
    num_gpu: int | None = Field(None, description=INERT)
    main_gpu: int | None = Field(None, description=INERT)
    num_thread: int | None = Field(None, description=INERT)
    numa: bool | None = Field(None, description=INERT)
    low_vram: bool | None = Field(None, description=INERT)
    use_mmap: bool | None = Field(None, description=INERT)
    use_mlock: bool | None = Field(None, description=INERT)

    @property
    def max_tokens(self) -> int | None:
        """None for all the room there is."""
        return self.num_predict if (self.num_predict or 0) > 0 else None

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )


class OllamaGeneration(Ask):
    """What ``/api/chat`` and ``/api/generate`` have in common."""

    model: OllamaName
    stream: bool = True
    options: Options = Field(default_factory=lambda: Options.model_validate({}))
    keep_alive: KeepAlive | None = Field(
        None, description="0 without a prompt unloads the model; else it stays, as always here"
    )
    format: Annotated[str | None, only("")] = None
    think: Annotated[bool | None, only(False)] = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_what_goes_together(self) -> OllamaGeneration:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "only allowed when logprobs is true")
        if self.unloads and not self.is_empty:
            raise refused("keep_alive", "0 is only taken without a prompt: it unloads the model")
        return self

    @property
    def is_empty(self) -> bool:
        """Nothing is to be generated: the model is loaded or unloaded."""
        raise NotImplementedError

    @property
    def unloads(self) -> bool:
        """Whether ``keep_alive`` is no time at all."""
        value = self.keep_alive
        if isinstance(value, str):
            return not re.sub(r"[^1-9]", "", value)
        return value == 0


class OllamaMessage(Ask):
    role: Annotated[Literal["system", "user", "assistant"], only("system", "user", "assistant")]
    content: Text = ""


class OllamaChatRequest(OllamaGeneration):
    """Body of ``POST /api/chat``."""

    messages: Many[OllamaMessage] = Field(
        default_factory=list,
        description="none loads the model; an assistant's turn at the end is continued",
    )

    @property
    def is_empty(self) -> bool:
        return not self.messages

    @property
    def turns(self) -> list[Turn]:
        """The conversation."""
        return [Turn(message.role, message.content) for message in self.messages]


class OllamaGenerateRequest(OllamaGeneration):
    """Body of ``POST /api/generate``."""

    prompt: Text = Field("", description="without one the model is loaded")
    system: Text = ""
    raw: bool = Field(False, description="the prompt is the whole text, no template is applied")
    suffix: Annotated[str | None, only("")] = None
    template: Annotated[str | None, only("")] = None

    @model_validator(mode="after")
    def _check_raw(self) -> OllamaGenerateRequest:
        if self.raw and self.system:
            raise refused("system", "not with raw, which applies no template")
        return self

    @property
    def is_empty(self) -> bool:
        return not self.prompt

    @property
    def turns(self) -> list[Turn]:
        """The prompt as a conversation."""
        told = [Turn("system", self.system)] if self.system else []
        return [*told, Turn("user", self.prompt)]


class Named(Ask):
    """A model; ``name`` is the older spelling of ``model``."""

    model: OllamaName

    @model_validator(mode="before")
    @classmethod
    def _from_older_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and "name" in data and data.get("model") in (None, ""):
            rest = {key: value for key, value in data.items() if key not in ("model", "name")}
            return {"model": data["name"], **rest}
        return data


class ShowRequest(Named):
    """Body of ``POST /api/show``."""

    verbose: Annotated[bool | None, only(False)] = None


class DeleteRequest(Named):
    """Body of ``DELETE /api/delete``."""


class PullRequest(Named):
    """Body of ``POST /api/pull``."""

    stream: bool = True
    insecure: Annotated[bool | None, only(False)] = None
