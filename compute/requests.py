"""What the control plane may ask of a port, checked: terms become typed orders.

The two planes may run different versions for the length of a rolling restart, so a
missing key takes its default and an unknown key is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from bridge.show import show
from bridge.term import Ref, Term
from bridge.text import text_of
from compute.sampler import SamplingParams
from compute.worker import Submit


class BadRequest(ValueError):
    """A key is missing, unknown or of the wrong type; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """One rank's part of an instance.

    Attributes:
        instance: id of the instance, epoch its generation.
        path: GGUF file or safetensors folder on this machine.
        context_tokens: 0 takes the model's own.
        threads: CPU threads of this rank; 0 lets the engine choose.
        device: ``cpu``, ``cuda:0``; empty lets the engine choose.
    """

    instance: str
    epoch: int
    rank: int
    world_size: int
    path: str
    context_tokens: int = 0
    num_slots: int = 4
    threads: int = 0
    device: str = ""
    prefill_chunk_tokens: int = 256

    @classmethod
    def from_term(cls, options: Mapping[Any, Term]) -> Self:
        """Raises BadRequest."""
        return cls(**_checked(cls, options))

    def fingerprint(self) -> str:
        """Equal for two orders that need the same bytes in memory (the epoch does not matter)."""
        key = "|".join(str(getattr(self, f.name)) for f in fields(self) if f.name != "epoch")
        return hashlib.sha256(key.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SubmitOrder:
    prompt: list[int]
    max_tokens: int
    request_id: str = ""  # for logs only
    generated: tuple[int, ...] | list[int] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] | list[tuple[int, float]] = ()
    seed: int = 0
    stop_ids: tuple[int, ...] | list[int] = ()
    logprobs: int = -1  # -1: none wanted


def to_submit(ref: Ref, options: Mapping[Any, Term]) -> Submit:
    """Read one request. Raises BadRequest with the key's name."""
    o = _SubmitOrder(**_checked(_SubmitOrder, options))
    return Submit(
        request_id=ref,
        prompt_ids=tuple(o.prompt),
        generated_ids=tuple(o.generated),
        max_tokens=o.max_tokens,
        params=SamplingParams(
            temperature=float(o.temperature),
            top_p=float(o.top_p),
            top_k=o.top_k,
            min_p=float(o.min_p),
            presence_penalty=float(o.presence_penalty),
            frequency_penalty=float(o.frequency_penalty),
            logit_bias={int(k): float(v) for k, v in o.logit_bias},
            seed=o.seed,
        ),
        stop_ids=frozenset(o.stop_ids),
        logprobs=None if o.logprobs < 0 else o.logprobs,
    )


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str, bytes),
    "int": (int,),
    "float": (int, float),
}


def _checked(cls: type, options: Mapping[Any, Term]) -> dict[str, Any]:
    """Keyword arguments for ``cls`` from a term map: names and scalar types are checked."""
    known = {f.name: f for f in fields(cls)}
    found: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key)
        if name not in known:
            raise BadRequest(f"unknown key {name!r} in {cls.__name__}")
        kind = str(known[name].type)
        allowed = _KINDS.get(kind, (list, tuple))
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise BadRequest(f"{name}: expected {kind}, got {show(value, 80)}")
        found[name] = text_of(value) if kind == "str" else value
    missing = [n for n, f in known.items() if n not in found and f.default is f.default_factory]
    if missing:
        raise BadRequest(f"missing {', '.join(missing)} in {cls.__name__}")
    return found
