"""Small models of every family, meshes to cut them over, and the error of each against one rank.

``python -m tests.compute.families`` prints the table families x modes x world sizes with the
largest error of the torch engine's logits beside those of transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compute.collectives import Group
from compute.stage import FloatArray, Peers, Row, Stage
from compute.torch.engine import TorchStage
from models.checkpoint import Checkpoint, open_checkpoint
from models.mesh import grid, mesh, units_of
from models.sharding import RankShard
from tests.compute.oracle import ask
from tests.compute.thread_group import thread_groups, together

Load = Callable[[Checkpoint, RankShard], Stage]
VOCAB = 131  # not a multiple of anything
CONTEXT_TOKENS, NUM_SLOTS = 96, 4
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,  # three and a half groups of 32
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
LATENT: dict[str, Any] = BASE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
del LATENT["head_dim"]  # which here would be the rotated part's
SHARP = {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": BASE | {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama, biases": BASE
    | {
        "model_type": "llama",
        "rope_parameters": YARN,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": BASE
    | {
        "model_type": "mistral",
        "sliding_window": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    },
    "qwen2": BASE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 32},
    "gemma3": BASE
    | {
        "model_type": "gemma3_text",
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 5.0,
    },
    "gemma3, caps": BASE
    | {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attn_logit_softcapping": 3.0,
    },
    "mixtral": BASE
    | {
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 11,
    },
    "qwen3_moe": BASE
    | {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 32,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "deepseek_v2": LATENT
    | SHARP
    | {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
        "attention_bias": True,
    },
    "deepseek_v2, lite": LATENT
    | {"model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": LATENT | SHARP | {"model_type": "deepseek_v3"},
}
LENGTHS = (1, 9, 60)
# Per step and sequence how many of its tokens are new: prefill in chunks, decode among it.
SCHEDULE = ((1, 4, 16), (0, 3, 30), (0, 1, 11), (0, 1, 1), (0, 0, 1), (0, 0, 1))


def sequences() -> list[list[int]]:
    """Some token ids, the same every time."""
    rng = np.random.default_rng(5)
    return [[int(i) for i in rng.integers(0, VOCAB, length)] for length in LENGTHS]


def steps() -> Iterator[list[Row]]:
    """The rows of every step of ``SCHEDULE``."""
    done = [0] * len(LENGTHS)
    for counts in SCHEDULE:
        rows = []
        for number, (count, ids) in enumerate(zip(counts, sequences(), strict=True)):
            if count:
                start, slot = done[number], (3, 0, 2)[number]
                rows.append(Row(slot, tuple(ids[start : start + count]), start))
                done[number] += count
        yield rows


@dataclass(frozen=True)
class Shape:
    """A mesh: ``tensor`` shares of each of ``pipeline`` stages, and what is done with experts."""

    tensor: tuple[float, ...] = (1,)
    pipeline: tuple[float, ...] = (1,)
    experts: Literal["inside", "across"] = "inside"

    def __str__(self) -> str:
        even = all(len(set(shares)) == 1 for shares in (self.tensor, self.pipeline))
        sizes = f"{len(self.tensor)}x{len(self.pipeline)}"
        shares = [":".join(f"{share:g}" for share in part) for part in (self.tensor, self.pipeline)]
        text = sizes if even else f"{sizes} ({shares[0]} x {shares[1]})"
        return f"{text} {self.experts}"


SHAPES = [
    *(Shape((1,) * size) for size in (1, 2, 3, 4)),
    *(Shape((1,), (1,) * size) for size in (2, 3, 4)),
    Shape((1, 1), (1, 1)),
    Shape((3, 1)),
    Shape((1, 5, 2)),
    Shape((2, 1), (1, 3)),
]
ACROSS = [Shape(shape.tensor, shape.pipeline, "across") for shape in SHAPES if shape.tensor[1:]]


def shapes_of(name: str) -> list[Shape]:
    """All meshes of a family: those with experts are cut in both ways."""
    sparse = any("experts" in key for key in FAMILIES[name])
    return [*SHAPES, *ACROSS] if sparse else SHAPES


def make(root: Path) -> dict[str, Path]:
    """A folder for every family, with transformers' logits beside the weights."""
    folders = {name: root / str(number) for number, name in enumerate(FAMILIES)}
    ask(
        *(
            {"config": FAMILIES[name], "folder": str(folder), "ids": sequences()}
            for name, folder in folders.items()
        )
    )
    return folders


def on_torch(checkpoint: Checkpoint, shard: RankShard) -> Stage:
    """A rank in torch on the CPU, in float32."""
    return TorchStage.load(
        checkpoint,
        shard,
        context_tokens=CONTEXT_TOKENS,
        num_slots=NUM_SLOTS,
        threads=1,
        device="cpu",
        on_progress=lambda done, total: None,
    )


@dataclass
class Mesh:
    """All ranks of a mesh in this process, tensor ranks as threads."""

    stages: list[list[Stage]]
    groups: list[list[Group]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.groups = [thread_groups(len(stage)) for stage in self.stages]

    def run(self, rows: Sequence[Row]) -> FloatArray:
        """Logits of one step; all tensor ranks agree about what leaves their stage."""
        residual: FloatArray | None = None
        for stage, groups in zip(self.stages, self.groups, strict=True):
            vocab = tuple(rank.shard.vocab for rank in stage)
            calls = [
                partial(
                    rank.run,
                    rows,
                    residual,
                    Peers(group, vocab, 30.0) if len(stage) > 1 else None,
                )
                for rank, group in zip(stage, groups, strict=True)
            ]
            made = together(calls, groups) if len(calls) > 1 else [calls[0]()]
            for other in made[1:]:
                np.testing.assert_array_equal(other, made[0])
            residual = made[0]
        assert residual is not None
        return residual

    def close(self) -> None:
        """Close every rank."""
        for stage in self.stages:
            for rank in stage:
                rank.close()


@contextmanager
def cut(folder: Path, shape: Shape, load: Load = on_torch) -> Iterator[Mesh]:
    """A model over a mesh."""
    checkpoint = open_checkpoint(folder)
    shards = mesh(
        checkpoint.spec,
        grid(shape.tensor, shape.pipeline),
        units=units_of(checkpoint.spec, checkpoint),
        experts=shape.experts,
        split_embedding=True,
    )
    ranks = [load(checkpoint, shard) for shard in shards]
    bounds = range(0, len(ranks) + 1, len(shape.tensor))
    built = Mesh([ranks[start:stop] for start, stop in pairwise(bounds)])
    try:
        yield built
    finally:
        built.close()


def error(folder: Path, shape: Shape, load: Load = on_torch) -> float:
    """Largest difference to transformers over ``SCHEDULE``, beside the largest logit."""
    with np.load(folder / "logits.npz") as saved:
        expected = [saved[key] for key in saved.files]
    worst, largest = 0.0, max(float(np.abs(logits).max()) for logits in expected)
    with cut(folder, shape, load) as built:
        for rows in steps():
            found = built.run(rows)
            for row, logits in zip(rows, found, strict=True):
                number = (3, 0, 2).index(row.slot)
                reference = expected[number][row.start + len(row.ids) - 1]
                worst = max(worst, float(np.abs(logits - reference).max()))
    return worst / largest


def main() -> None:
    """Print the table."""
    columns = [str(shape).removesuffix(" inside") for shape in SHAPES]
    print(f"| family | experts | {' | '.join(columns)} |")
    print("| --- " * (len(columns) + 2) + "|")
    with tempfile.TemporaryDirectory() as root:
        for name, folder in make(Path(root)).items():
            errors = {shape: error(folder, shape) for shape in shapes_of(name)}
            for mode in ("inside", "across"):
                mine = [Shape(shape.tensor, shape.pipeline, mode) for shape in SHAPES]
                if not any(shape in errors for shape in mine if shape.tensor[1:]):
                    continue
                sparse = len(errors) > len(SHAPES)
                cells = [f"{errors[s]:.1e}" if s in errors else "" for s in mine]
                print(f"| {name} | {mode if sparse else ''} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
