"""What the control plane may ask of a port, checked: terms become typed orders.

The two planes may run different versions for the length of a rolling restart, so a
missing key takes its default and an unknown key is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from bridge.show import show
from bridge.term import Ref, Term
from bridge.text import text_of
from compute.errors import BadRequest
from compute.sampler import SamplingParams
from compute.worker import Submit
from models.constraint import KINDS, Constraint


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """One rank's part of an instance.

    Attributes:
        instance: id of the instance, epoch its generation.
        group: secret id of this generation of ranks.
        tensor, pipeline: ranks in each direction of the mesh.
        shares: of every rank, in rank order; empty for equal ones.
        experts: ``inside`` cuts every routed expert, ``across`` deals them out whole.
        hosts: machine of every rank; empty where all are on one.
        places: of every rank, as ``prepare`` gave them.
        devices: of every rank; empty where all have ``device``.
        path: GGUF file or safetensors folder on this machine.
        context_tokens: 0 takes the model's own.
        threads: CPU threads of this rank; 0 takes all cores.
        device: ``cpu``, ``cuda:0``, ``mlx``; empty lets the engine choose.
        limit_bytes: memory that the rank may take; 0 sets no limit.
        num_slots: key/value memory is for so many sequences of full length; shorter ones run in
            larger numbers.
        prefill_chunk_tokens: most tokens of a step that prefills; 0 chooses by the pipeline.
        queue_limit: requests that may wait; 0 takes ``compute.worker.QUEUE_LIMIT``.
        join_timeout_s: for the other ranks to load; step_timeout_s: for a silent one to be lost.
    """

    instance: str
    epoch: int
    rank: int
    path: str
    group: str = field(default="", repr=False)
    tensor: int = 1
    pipeline: int = 1
    shares: tuple[float, ...] | list[float] = ()
    experts: str = "inside"
    hosts: tuple[str, ...] | list[str] = ()
    places: tuple[Term, ...] | list[Term] = ()
    devices: tuple[str, ...] | list[str] = ()
    context_tokens: int = 0
    num_slots: int = 4
    threads: int = 0
    device: str = ""
    limit_bytes: int = 0
    prefill_chunk_tokens: int = 0
    queue_limit: int = 0
    join_timeout_s: float = 1800.0
    step_timeout_s: float = 120.0

    @property
    def world_size(self) -> int:
        """Ranks in the mesh."""
        return self.tensor * self.pipeline

    @classmethod
    def from_term(cls, options: Mapping[Any, Term]) -> Self:
        """Raises BadRequest."""
        order = cls(**_checked(cls, options))
        world = order.world_size
        if min(order.tensor, order.pipeline) < 1 or not 0 <= order.rank < world:
            raise BadRequest(
                f"rank {order.rank} of a mesh of {order.pipeline} x {order.tensor} ranks"
            )
        for name in ("shares", "hosts", "places", "devices"):
            given = getattr(order, name)
            if given and len(given) != world:
                raise BadRequest(f"{name}: expected {world}, one a rank, got {len(given)}")
        if world > 1 and not (order.group and order.places):
            raise BadRequest(f"{world} ranks need a group and places to meet at")
        if order.experts not in ("inside", "across"):
            raise BadRequest(f"experts: expected inside or across, got {order.experts!r}")
        return order

    def grid(self) -> tuple[tuple[float, ...], ...]:
        """Shares as ``[stage][tensor rank]``. Raises BadRequest for what is no number."""
        flat = self.shares or (1.0,) * self.world_size
        if not all(isinstance(s, int | float) and not isinstance(s, bool) for s in flat):
            raise BadRequest(f"shares: expected numbers, got {show(list(flat), 80)}")
        floats = [float(share) for share in flat]
        return tuple(
            tuple(floats[stage * self.tensor : (stage + 1) * self.tensor])
            for stage in range(self.pipeline)
        )


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
    grammar: dict[Any, Term] = field(default_factory=dict)  # kind, text, before; empty: any answer
    fair_key: str = ""  # requests of different keys take turns; empty is a key like any other


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
        constraint=_constraint(o.grammar) if o.grammar else None,
        fair_key=o.fair_key,
    )


def _constraint(given: Mapping[Any, Term]) -> Constraint:
    values = {str(key): value for key, value in given.items()}
    for name in values:
        if name not in ("kind", "text", "before"):
            raise BadRequest(f"grammar: unknown key {name!r}")
    kind, texts = str(values.get("kind")), (values.get("text", ""), values.get("before", ""))
    if kind not in KINDS or not all(isinstance(text, str | bytes) for text in texts):
        raise BadRequest(f"grammar: expected one of {', '.join(KINDS)} as kind, and texts")
    return Constraint(kind, *map(text_of, texts))  # type: ignore[arg-type]  # one of KINDS


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str, bytes),
    "int": (int,),
    "float": (int, float),
    "dict[Any, Term]": (dict,),
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
