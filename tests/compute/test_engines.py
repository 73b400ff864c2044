"""Both engines against transformers: small random models of every family they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compute.engine import Row, StageEngine, load_engine
from compute.stage import MAX_POSITIONS
from compute.torch.engine import TorchStage
from models.checkpoint import open_checkpoint
from models.mesh import whole
from tests.compute.oracle import ask

Floats = npt.NDArray[np.float32]
VOCAB = 131  # not a multiple of anything
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
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
CASES: dict[str, dict[str, Any]] = {
    "llama": BASE | {"model_type": "llama"},
    "llama_tied_wide": BASE
    | {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 102, "head_dim": 48},
    "llama_bias": BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3_rope": BASE | {"model_type": "llama", "rope_parameters": LLAMA3},
    "qwen2": BASE | {"model_type": "qwen2", "head_dim": 16, "use_sliding_window": False},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "gemma3": BASE
    | {
        "model_type": "gemma3_text",
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
    },
}
STORED = {"llama_bf16": ("llama", "bfloat16"), "llama_f16": ("llama", "float16")}
LENGTHS = (1, 9, 70)


def sequences() -> list[list[int]]:
    """Some token ids, the same every time."""
    rng = np.random.default_rng(5)
    return [[int(i) for i in rng.integers(0, VOCAB, length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every case, with transformers' logits."""
    root = tmp_path_factory.mktemp("models")
    cases = {name: (name, "float32") for name in CASES} | STORED
    ask(
        *(
            {"config": CASES[case], "folder": str(root / name), "ids": sequences(), "dtype": dtype}
            for name, (case, dtype) in cases.items()
        )
    )
    return {name: root / name for name in cases}


def on_cpu(path: Path) -> StageEngine:
    return load_engine(path, context_tokens=160, num_slots=4, threads=2, device="cpu")


def on_torch(path: Path) -> StageEngine:
    checkpoint = open_checkpoint(path)
    stage = TorchStage.load(
        checkpoint,
        whole(checkpoint.spec),
        context_tokens=160,
        num_slots=4,
        threads=1,
        device="cpu",
        on_progress=lambda done, total: None,
    )
    return StageEngine(stage)


def logits_of(engine: StageEngine, ids: list[int], *, slot: int = 0, start: int = 0) -> Floats:
    """Logits after every position from ``start``, one token at a time: float32 (n, vocab)."""
    rows = [Row(slot, (token_id,), start + n) for n, token_id in enumerate(ids[start:])]
    return np.concatenate([engine.forward([row]) for row in rows])


def error(found: Floats, expected: Floats) -> float:
    """Largest difference beside the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("load", [on_cpu, on_torch])
@pytest.mark.parametrize("name", [*CASES, *STORED])
def test_logits_are_those_of_transformers(
    folders: dict[str, Path], name: str, load: Callable[[Path], StageEngine]
) -> None:
    engine = load(folders[name])
    with np.load(folders[name] / "logits.npz") as saved:
        expected = [saved[key] for key in saved.files]
    for slot, (ids, reference) in enumerate(zip(sequences(), expected, strict=True)):
        done = max(0, len(ids) - 9)  # the cache's first page is prefilled, its edge decoded
        if done:
            engine.forward([Row(slot, tuple(ids[:done]), 0, want_logits=False)])
        assert error(logits_of(engine, ids, slot=slot, start=done), reference[done:]) < 2e-4
    rows = [Row(slot, tuple(ids), 0) for slot, ids in enumerate(sequences())]
    at_once = engine.forward(rows)
    assert error(at_once, np.stack([reference[-1] for reference in expected])) < 2e-4
    engine.close()


@pytest.fixture
def cpu_llama(folders: dict[str, Path]) -> Iterator[StageEngine]:
    engine = on_cpu(folders["llama"])
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_row_is_the_same_bits_in_any_company_chunking_and_thread_count(
    folders: dict[str, Path], cpu_llama: StageEngine
) -> None:
    ids = sequences()[2]
    alone = logits_of(cpu_llama, ids)[-1]
    company = [Row(slot, tuple(sequences()[1]), 0, want_logits=slot == 1) for slot in (1, 2, 3)]
    for cuts in ([70], [1, 69], [37, 1, 31, 1], [6, 7, 8, 49]):
        start = 0
        for count in cuts:
            row = Row(0, tuple(ids[start : start + count]), start)
            together = cpu_llama.forward([*company, row])
            start += count
        assert np.array_equal(together[-1], alone), cuts
    single = load_engine(folders["llama"], context_tokens=160, num_slots=1, threads=1, device="cpu")
    assert np.array_equal(single.forward([Row(0, tuple(ids), 0)])[0], alone)
    single.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_long_steps_run_in_parts(cpu_llama: StageEngine) -> None:
    ids = sequences()[2]
    rows = [Row(slot, tuple(ids), 0, want_logits=slot != 1) for slot in range(4)]
    assert sum(len(row.ids) for row in rows) > MAX_POSITIONS
    logits = cpu_llama.forward(rows)
    assert logits.shape == (3, VOCAB)
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row(16, (1,), 0)], "slot 16 is outside"),
        ([Row(0, (1,), 0), Row(0, (1,), 1)], "twice"),
        ([Row(0, (), 0)], "at least one token"),
        ([Row(0, (1, 2), 159)], "outside the context of 160"),
        ([Row(0, (VOCAB,), 0)], "token ids must be"),
        ([Row(0, (-1,), 0)], "token ids must be"),
    ],
)
def test_wrong_rows_are_refused(cpu_llama: StageEngine, rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu_llama.forward(rows)
    assert cpu_llama.forward([]).shape == (0, VOCAB)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_loading_says_how_far_it_is_and_refuses_limits(folders: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    engine = load_engine(
        folders["llama"],
        context_tokens=64,
        num_slots=1,
        threads=1,
        device="cpu",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    engine.close()
    assert seen[0][0] == 0
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(
            open_checkpoint(folders["llama"]).tensor(name).size_bytes
            for name in open_checkpoint(folders["llama"]).names()
        )
    )
    assert seen == sorted(seen)
    with pytest.raises(ValueError, match=r"beyond the model's 256"):
        load_engine(folders["llama"], context_tokens=257, num_slots=1, threads=1, device="cpu")
    with pytest.raises(ValueError, match="at least 1"):
        load_engine(folders["llama"], context_tokens=64, num_slots=0, threads=1, device="cpu")
    with pytest.raises(ValueError, match="unknown device"):
        load_engine(folders["llama"], context_tokens=64, num_slots=1, threads=1, device="tpu")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_named(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"no device cuda:1: torch sees 0 CUDA devices"):
        load_engine(folders["llama"], context_tokens=8, num_slots=1, threads=1, device="cuda:1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [*CASES, *STORED])
def test_cuda_in_bf16_is_near_float32(folders: dict[str, Path], name: str) -> None:
    engine = load_engine(folders[name], context_tokens=160, num_slots=4, threads=1, device="cuda")
    with np.load(folders[name] / "logits.npz") as saved:
        reference = saved[saved.files[2]]
    found = engine.forward([Row(0, tuple(sequences()[2]), 0)])
    assert error(found, reference[-1:]) < 5e-2
    engine.close()
