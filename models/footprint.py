"""What a rank takes of a machine's memory with each kind of kernels, before anything is read.

The engines' figures are data here, so that placement and loading ask one function; a test of the
compute plane compares them with what loaded engines report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from models.errors import NoRoom
from models.layout import layer_tensors
from models.memory import Packing, Stored, estimate
from models.sharding import RankShard
from models.spec import ModelSpec

Kernels = Literal["compiled", "torch", "mlx"]
MAX_POSITIONS: Final = 256  # new positions in one run of a stage
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that one rank takes once every slot is full.

    Attributes:
        weights_bytes, kv_bytes, workspace_bytes: as the loaded stage reports them.
        process_bytes: what the rank's process takes beside them: interpreter and libraries.
    """

    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes + self.process_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What there is to know of one engine on one kind of device.

    Attributes:
        packing: how matrices lie in memory.
        kv_bytes_per_element: of a remembered number.
        page_tokens: a slot's positions are rounded up to multiples of this.
        activation_bytes: of a number between two operations.
        process_bytes: resident memory of a port's process beside its model: interpreter,
            libraries, compiled code; on a GPU what the driver and libraries keep there.
    """

    packing: Packing
    kv_bytes_per_element: int
    page_tokens: int
    activation_bytes: int
    process_bytes: int


# Bytes of a block of 32 outputs by 32 inputs / 1024, see compute.cpu.layout.BLOCK_BYTES; formats
# are those of compute.cpu.stored.TAKE_APART. Whatever is not listed is kept as float32.
_BLOCK_BYTES: Final = {
    "F32": 4096,
    "F16": 2048,
    "BF16": 2048,
    "Q4_1": 640,
    **dict.fromkeys(("Q5_0", "Q8_0"), 1088),
    **dict.fromkeys(("Q4_0", "Q4_K"), 768),
    **dict.fromkeys(("Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K"), 1536),
}
# Processes: compute.bench_memory on Linux x86-64 with CPython 3.11, torch 2.13 (CPU build) and
# mlx 0.32. With compiled kernels 156 MiB before loading, 6 more behind a first step; all of it
# with code from the cache: a process that compiles itself takes 40 to 90 MiB more.
_FIGURES: Final[Mapping[tuple[Kernels, str], Figures]] = {
    ("compiled", "cpu"): Figures(
        packing=Packing(
            bytes_per_weight={kind: size / 1024 for kind, size in _BLOCK_BYTES.items()},
            otherwise=4.0,
            tile=(32, 32),
            group=32,
        ),
        kv_bytes_per_element=4,
        page_tokens=64,
        activation_bytes=4,
        process_bytes=162 * MIB,
    ),
    ("torch", "cpu"): Figures(
        packing=Packing(otherwise=4.0),
        kv_bytes_per_element=4,
        page_tokens=1,
        activation_bytes=4,
        process_bytes=235 * MIB,
    ),
    ("torch", "cuda"): Figures(
        packing=Packing(otherwise=2.0),
        kv_bytes_per_element=2,
        page_tokens=1,
        activation_bytes=2,
        process_bytes=600 * MIB,
    ),
    ("mlx", "mlx"): Figures(
        packing=Packing(otherwise=2.0),
        kv_bytes_per_element=2,
        page_tokens=1,
        activation_bytes=2,
        process_bytes=60 * MIB,
    ),
}


def kernels_for(spec: ModelSpec, device: str) -> Kernels:
    """What multiplies on a device (``cpu``, ``cuda:N``, ``mlx``), as ``load_stage`` chooses it."""
    match device.partition(":")[0]:
        case "mlx":
            return "mlx"
        case "cpu" if spec.experts is None and spec.latent is None and spec.head_dim % 16 == 0:
            return "compiled"
        case _:
            return "torch"


def footprint(
    spec: ModelSpec,
    checkpoint: Stored,
    shard: RankShard,
    *,
    kernels: Kernels,
    device: str,
    context_tokens: int,
    num_slots: int,
    threads: int,
) -> Footprint:
    """Memory of one rank. Headers alone are read.

    Args:
        spec: the model.
        checkpoint: says how each weight is stored; ``models.memory.Assumed`` where there is none.
        shard: what the rank holds.
        kernels: see ``kernels_for``.
        device: ``cpu``, ``cuda:N`` or ``mlx``.
        context_tokens, num_slots: of the key/value memory.
        threads: CPU threads of the rank.

    Raises:
        ValueError: no engine of these kernels runs on that device, or a size is not positive.
        models.plans.UnmatchedWeight: the family's plan lacks a weight.
    """
    figures = _FIGURES.get((kernels, device.partition(":")[0]))
    if figures is None or threads < 1:
        raise ValueError(f"no {kernels} kernels on {device!r} with {threads} threads")
    tables = rope_bytes(spec, shard, context_tokens)
    if kernels == "compiled":
        workspace = tables + step_bytes(spec, shard, context_tokens, num_slots, threads)
    else:
        workspace = tables + passing_bytes(spec, shard, num_slots, figures.activation_bytes)
    found = estimate(
        spec,
        checkpoint,
        shard,
        context_tokens=context_tokens,
        num_slots=num_slots,
        kv_bytes_per_element=figures.kv_bytes_per_element,
        workspace_bytes=workspace,
        packing=figures.packing,
        page_tokens=figures.page_tokens,
    )
    return Footprint(
        weights_bytes=found.weights_bytes,
        kv_bytes=found.kv_bytes,
        workspace_bytes=found.workspace_bytes,
        process_bytes=figures.process_bytes,
    )


def check_room(needed: Footprint, limit_bytes: int) -> None:
    """Raise NoRoom, with the parts, where a rank would take more than it may; 0 is no limit."""
    if limit_bytes and needed.total_bytes > limit_bytes:
        raise NoRoom(
            needed.total_bytes,
            limit_bytes,
            {
                "weights": needed.weights_bytes,
                "keys and values": needed.kv_bytes,
                "workspace": needed.workspace_bytes,
                "process": needed.process_bytes,
            },
        )


def rope_bytes(spec: ModelSpec, shard: RankShard, context_tokens: int) -> int:
    """Cosines and sines of every position, float32, for each rotation that a rank's layers use."""
    ropes = {spec.rope_of(layer) for layer in shard.layers}
    return sum(4 * context_tokens * rope.dim for rope in ropes)


def _padded(size: int) -> int:
    return -(-size // 32) * 32


def step_bytes(
    spec: ModelSpec, shard: RankShard, context_tokens: int, num_slots: int, threads: int
) -> int:
    """Buffers of the compiled kernels, one by one: see ``compute.cpu.step.Step``."""
    pages = -(-context_tokens // 64)
    rows = min(MAX_POSITIONS, num_slots * pages * 64)
    hidden, inner = _padded(spec.hidden_size), _padded(len(shard.ffn))
    queries = _padded(len(shard.query_heads) * spec.head_dim)
    keys = _padded(len(shard.kv_heads) * spec.head_dim)
    features = (
        *(hidden, hidden, hidden // 16),  # residual, normed input and its sums
        *(queries, keys, keys, queries, queries // 16),
        *(inner, inner // 16, hidden),
    )
    vocab = _padded(len(shard.vocab) if shard.is_last(spec) else 0)
    logits = vocab * min(num_slots, MAX_POSITIONS)
    run = 8 * shard.queries_a_kv_head  # queries of a run of positions
    scratch = max(4096 + rows * 128, run * (2 * spec.head_dim + pages * 64) * 4)
    scratch = -(-scratch // 4096) * 4096 * threads
    counters = 128 * (8 * len(shard.layers) + 5)
    aligned = (len(features) + 2 + 9) * 64  # each buffer begins on a cache line
    return 4 * (rows * sum(features) + logits) + scratch + counters + 6 * 8 * rows + aligned


def passing_bytes(spec: ModelSpec, shard: RankShard, num_slots: int, activation_bytes: int) -> int:
    """What operations of one run hold at once: the widest layer's values, and the logits."""
    widest = max(
        sum(shape[0] for name, shape in layer_tensors(spec).items() if part in name)
        for part in ("self_attn", "mlp")
    )
    passing = MAX_POSITIONS * (widest + 4 * spec.hidden_size) * activation_bytes
    logits = spec.vocab_size * num_slots * (4 + activation_bytes) if shard.is_last(spec) else 0
    return passing + logits
