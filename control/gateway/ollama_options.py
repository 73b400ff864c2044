"""Ollama's options: sampling, and what only sets how a machine is used."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from control.gateway.ask import INERT, MANY_TOKENS, Ask, StopTexts, only
from control.gateway.sampling import Sampling

_DURATION = re.compile(r"-?((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))+|-?\d+")


def _duration(value: Any) -> Any:
    if isinstance(value, str) and not _DURATION.fullmatch(value):
        raise PydanticCustomError("bad_duration", "must be seconds or a text such as '5m'")
    return value


def _some(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("no_tokens", "must be at least 1; -1 takes the room there is")
    return value


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
