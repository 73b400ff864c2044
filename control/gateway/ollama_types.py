"""Bodies of Ollama's API: every honoured field with its range, no other.

An empty text asks for nothing where Ollama's own clients send one by default.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from control.gateway.ask import (
    Ask,
    Many,
    ModelName,
    Text,
    only,
    refused,
)
from control.gateway.ollama_options import KeepAlive, Options
from control.gateway.turn import Turn

LATEST = ":latest"


def _plain_name(name: str) -> str:
    """Ollama's tag for a model without one names nothing here."""
    return name.removesuffix(LATEST) or name


OllamaName = Annotated[ModelName, AfterValidator(_plain_name)]


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
    truncate: Annotated[bool | None, only(False)] = None
    shift: Annotated[bool | None, only(False)] = None
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
        """Ollama's own command sends both, the older one empty."""
        if not isinstance(data, dict) or "name" not in data:
            return data
        model, rest = data.get("model"), {k: v for k, v in data.items() if k != "name"}
        if data["name"] in (None, "", model):
            return rest
        return {**rest, "model": data["name"]} if model in (None, "") else data


class ShowRequest(Named):
    """Body of ``POST /api/show``."""

    verbose: Annotated[bool | None, only(False)] = None
    system: Annotated[str | None, only("")] = None
    template: Annotated[str | None, only("")] = None


class DeleteRequest(Named):
    """Body of ``DELETE /api/delete``."""


class PullRequest(Named):
    """Body of ``POST /api/pull``."""

    stream: bool = True
    insecure: Annotated[bool | None, only(False)] = None
    username: Annotated[str | None, only("")] = None
    password: Annotated[str | None, only("")] = None
