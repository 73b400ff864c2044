"""What a rank takes of a machine's memory with each kind of kernels, before anything is read.

Placement and loading ask one function; a test of the compute plane compares its answer with what
loaded engines report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from models.engine_figures import FIGURES, Kernels
from models.errors import NoRoom
from models.layout import expected_tensors
from models.memory import estimate
from models.quant import KINDS
from models.sharding import RankShard
from models.spec import ExpertSpec, ModelSpec
from models.stored import Stored

__all__ = ["Footprint", "Kernels", "check_room", "footprint", "kernels_for"]

MAX_POSITIONS: Final = 256  # new positions in one run of a stage
PAGE_TOKENS: Final = 64  # positions of a page of key/value memory
SEQUENCES_A_SLOT: Final = 4  # that may run at once where they are shorter than a slot
LATENT_SCORES: Final = 1 << 23  # what compute.torch.latent.SCORES allows at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that one rank takes once its key/value memory is full.

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


def most_sequences(num_slots: int) -> int:
    """Sequences that run at once in the memory of ``num_slots`` of full length."""
    return max(num_slots, min(SEQUENCES_A_SLOT * num_slots, MAX_POSITIONS))


def kernels_for(spec: ModelSpec, device: str) -> Kernels:
    """What multiplies on a device (``cpu``, ``cuda:N``, ``mlx``), as ``load_stage`` chooses it."""
    match device.partition(":")[0]:
        case "mlx" | "mlx-cpu":
            return "mlx"
        case "cpu" if spec.latent is None and spec.head_dim % 16 == 0:
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
    network: bool = False,
) -> Footprint:
    """Memory of one rank. Headers alone are read.

    Args:
        spec: the model.
        checkpoint: says how each weight is stored; ``models.stored.Assumed`` where it is not here.
        shard: what the rank holds.
        kernels: see ``kernels_for``.
        device: ``cpu``, ``cuda:N`` or ``mlx``; ``mlx-cpu`` for MLX without a GPU.
        context_tokens, num_slots: key/value memory is for so many sequences of so many tokens.
        threads: CPU threads of the rank.
        network: other ranks of its mesh are on other machines.

    Raises:
        ValueError: no engine of these kernels runs on that device, or a size is not positive.
        models.plans.UnmatchedWeight: the family's plan lacks a weight.
    """
    where = device.partition(":")[0]
    if where == "mlx-cpu" or (where == "mlx" and _mostly(spec, checkpoint) == "F32"):
        where = "mlx-wide"
    figures = FIGURES.get((kernels, where))
    if figures is None or threads < 1:
        raise ValueError(f"no {kernels} kernels on {device!r} with {threads} threads")
    if kernels == "compiled":
        workspace = rope_bytes(spec, shard, context_tokens)
        workspace += step_bytes(spec, shard, context_tokens, num_slots, threads)
    else:
        workspace = passing_bytes(spec, shard, context_tokens, num_slots, fused=kernels == "torch")
    found = estimate(
        spec,
        checkpoint,
        shard,
        context_tokens=context_tokens,
        num_slots=num_slots,
        kv_bytes_per_element=figures.kv_bytes_per_element,
        workspace_bytes=workspace,
        packing=figures.packing,
        page_tokens=PAGE_TOKENS,
    )
    return Footprint(
        weights_bytes=found.weights_bytes,
        kv_bytes=found.kv_bytes,
        workspace_bytes=found.workspace_bytes,
        process_bytes=figures.process_bytes + (figures.network_bytes if network else 0),
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
    pages = -(-context_tokens // PAGE_TOKENS)
    rows = min(MAX_POSITIONS, num_slots * pages * PAGE_TOKENS)
    hidden, dense = _padded(spec.hidden_size), len(shard.shared_ffn)
    if not all(spec.is_sparse(layer) for layer in shard.layers):
        dense = max(dense, len(shard.ffn))
    inner = _padded(dense)
    queries = _padded(len(shard.query_heads) * spec.head_dim)
    keys = _padded(len(shard.kv_heads) * spec.head_dim)
    features = (
        *(hidden, hidden, hidden // 16),  # residual, normed input and its sums
        *(queries, keys, keys, queries, queries // 16),
        *(inner, inner // 16, hidden),
    )
    vocab = _padded(len(shard.vocab) if shard.is_last() else 0)
    logits = vocab * min(most_sequences(num_slots), MAX_POSITIONS)
    run = 8 * shard.queries_a_kv_head  # queries of a run of positions
    scratch = max(4096 + rows * 128, run * (2 * spec.head_dim + pages * PAGE_TOKENS) * 4)
    experts = 0
    if spec.experts is not None:
        every = _padded(spec.experts.num_experts)
        scratch = max(scratch, 20 * every)
        experts = 4 * rows * every + _expert_bytes(spec.experts, shard, rows, hidden)
    scratch = -(-scratch // 4096) * 4096 * threads
    counters = 128 * (15 * len(shard.layers) + 5)
    aligned = (len(features) + 2 + 9) * 64  # each buffer begins on a cache line
    numbers = 4 * (rows * sum(features) + logits) + 6 * 8 * rows
    return numbers + experts + scratch + counters + aligned


def _expert_bytes(experts: ExpertSpec, shard: RankShard, rows: int, hidden: int) -> int:
    """Every row's inputs and inner features beside each of its experts, and the choices."""
    here, inner = len(shard.experts), _padded(len(shard.expert_ffn))
    pairs = rows * min(experts.num_active, here)
    choices = 4 * rows * experts.num_active * (1 + 2 + 2)
    spans = 8 * (2 * pairs + 3 * here + 2)
    return 4 * pairs * (hidden + inner) * 17 // 16 + choices + spans + 14 * 64


def passing_bytes(
    spec: ModelSpec, shard: RankShard, context_tokens: int, num_slots: int, *, fused: bool
) -> int:
    """Most that operations hold at once where a library makes arrays as it goes, as float32.

    The residual and its copies, one half's inner features, the scores of one row, logits.

    Args:
        fused: plain attention keeps no scores, only which position sees which.
    """
    positions = min(MAX_POSITIONS, context_tokens * num_slots)
    experts, heads = spec.experts, len(shard.query_heads)
    inner = max(len(shard.ffn), len(shard.shared_ffn))
    if experts is not None:
        inner = max(inner, experts.num_active * (len(shard.expert_ffn) + spec.hidden_size))
    features = 6 * spec.hidden_size + max(4 * inner, 6 * heads * spec.head_dim)
    if fused and spec.attention_softcap is None and spec.latent is None:
        heads = shard.queries_a_kv_head
    scores = 2 * heads * min(positions, context_tokens) * context_tokens
    if fused and spec.latent is not None:
        scores = min(scores, 2 * LATENT_SCORES)
    logits = 2 * spec.vocab_size * min(most_sequences(num_slots), positions)
    return 4 * (positions * features + scores + logits)


def _mostly(spec: ModelSpec, checkpoint: Stored) -> str:
    """The format that most bytes of the file are in."""
    sizes: dict[str, float] = {}
    for name, shape in expected_tensors(spec).items():
        kind = checkpoint.tensor(name).kind
        block = KINDS.get(kind)
        size = block.block_bytes / block.block_size if block else 0.5
        sizes[kind] = sizes.get(kind, 0.0) + math.prod(shape) * size
    return max(sizes, key=lambda kind: sizes[kind])
