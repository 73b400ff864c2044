"""What the surfaces (HTTP gateway, Erlang calls) need from the cluster, as one small protocol.

The gateway holds no knowledge of instances, epochs or ports: it asks for an open
model, hands over token ids and reads token events until the generation is done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from control.keys import ApiKey
from models.constraint import Constraint
from models.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One entry of the catalogue, as ``/v1/models`` and ``ctl model list`` show it."""

    id: str
    name: str
    family: str
    state: Literal["remote", "local", "loading", "ready", "failed"]
    size_bytes: int
    context_tokens: int
    aliases: tuple[str, ...] = ()
    created_s: int = 0


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A loaded model as a surface sees it: how text becomes tokens and back."""

    id: str
    tokenizer: Tokenizer
    chat_template: str | None
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One generation. Text limits (stop strings) are the caller's; ids are the engine's."""

    model: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None  # number of alternatives wanted beside the chosen token
    stop_ids: frozenset[int] = frozenset()  # end-of-sequence ids; not emitted
    request_id: str = ""  # shown in logs from the HTTP header to the rank
    constraint: Constraint | None = None  # checked by models.constraint.check before


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Token ``index`` (0-based) of the answer."""

    index: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The end of a generation. ``text`` says why when ``reason`` is ``error``."""

    reason: FinishReason
    text: str = ""


class Backend(Protocol):
    """The cluster as the surfaces use it."""

    async def models(self) -> list[ModelInfo]:
        """Catalogue with the state of each model on this cluster."""
        ...

    async def open_model(self, model: str, *, timeout_s: float) -> OpenModel:
        """Resolve an id or alias to a loaded model, waiting for one that is loading or recovering.

        Raises:
            UnknownModel: no card, instance or alias has this name (404).
            NotReady: known but not served now (503); carries ``retry_after_s``.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent | DoneEvent]:
        """Stream one generation; ends with exactly one DoneEvent. Closing the iterator cancels."""
        ...

    async def status(self) -> dict[str, Any]:
        """The map of CONTRACT section 3."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The shape a caller wants; None (or no shares) leaves the choice to the cluster."""

    tensor: int | None = None
    pipeline: int | None = None
    shares: tuple[float, ...] = ()
    experts: Literal["inside", "across"] | None = None
    engine: Literal["torch", "mlx"] | None = None
    context_tokens: int | None = None
    slots: int | None = None
    threads: int | None = None
    device: str | None = None
    goal: Literal["latency", "throughput"] | None = None
    replicas: int | None = None
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a token came lately through every rank of every ready instance, and if not, why."""

    ready: bool
    why: str = ""
    retry_after_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something that changed; ``kind`` names it (``instance``, ``node``, ``leader``, ...)."""

    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """How far a download is: ``phase`` as the model store names it, ``done`` at the end.

    Attributes:
        source: where it comes from; empty while that is open.
        total_bytes: 0 while unknown.
    """

    phase: str
    source: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


class ClusterControl(Protocol):
    """What operators ask of the cluster. All data is JSON-ready; errors are ControlErrors."""

    async def topology(self) -> list[dict[str, Any]]:
        """Links between machines with their measured latency and bandwidth."""
        ...

    async def tree(self) -> dict[str, Any]:
        """The live supervision tree with restart counts."""
        ...

    async def readiness(self) -> Readiness:
        """What ``/health/ready`` answers."""
        ...

    def events(self) -> AsyncIterator[ClusterEvent]:
        """Changes from now on, without end. Closing the iterator unsubscribes."""
        ...

    async def place(self, model: str, options: LoadOptions) -> dict[str, Any]:
        """Dry run: the chosen placement, and why every other was not."""
        ...

    async def load(self, model: str, options: LoadOptions) -> str:
        """Place and load a model; the new instance's id."""
        ...

    async def unload(self, instance_id: str) -> None:
        """Drain and unload an instance. Raises a ControlError of kind ``not_found``."""
        ...

    async def keys(self) -> list[dict[str, Any]]:
        """The API keys of the cluster, as ``ApiKey.public`` shows them."""
        ...

    async def add_key(self, record: ApiKey) -> None:
        """Make a key valid on every node. Raises a ControlError."""
        ...

    async def revoke_key(self, id: str) -> None:
        """End a key on every node. Raises a ControlError of kind ``not_found``."""
        ...

    async def swap(self, old: str, new: str) -> str:
        """Replace a model without a failed request; the new instance's id."""
        ...

    def pull(self, model: str) -> AsyncIterator[PullProgress]:
        """Download a model to this machine; ends after ``done``. Closing leaves it running."""
        ...

    async def remove(self, model: str) -> None:
        """Delete a model's files from this machine.

        Raises a ControlError of kind ``not_found`` where there are none, ``in_use`` while an
        instance runs it.
        """
        ...
