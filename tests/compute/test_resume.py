"""The worker on the real CPU engine: same tokens alone, in company, and after a crash."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import pytest

from compute import bench_batching, bench_engine
from compute.cpu.decoder import run_step
from compute.cpu.engine import CpuStage
from compute.cpu.warm import warm_up
from compute.engine import Row, StageEngine, load_engine
from compute.errors import OutOfMemory
from compute.kv_cache import KvCache
from compute.sampler import SamplingParams
from compute.worker import Done, Submit, Token, Worker
from models.checkpoint import open_checkpoint
from models.errors import CorruptModel, NoSuchModel
from models.mesh import whole
from ops.bench import batching, engine_speed
from tests.models.tiny import llama_tensors, write_gguf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # compiles on a fresh machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 128 tokens with random Q4_1 weights."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tensors = llama_tensors(kind="Q4_1")
    tensors["token_embd.weight"] = llama_tensors(kind="Q8_0")["token_embd.weight"]
    return write_gguf(path, tensors)


def load(model: Path, *, num_slots: int = 4, threads: int = 1) -> StageEngine:
    return load_engine(model, context_tokens=96, num_slots=num_slots, threads=threads, device="cpu")


def answers(worker: Worker, *requests: Submit) -> dict[Hashable, list[int]]:
    for request in requests:
        worker.submit(request)
    out: dict[Hashable, list[int]] = {request.request_id: [] for request in requests}
    while not worker.idle:
        for event in worker.step():
            if isinstance(event, Token):
                out[event.request_id].append(event.token_id)
            else:
                assert event == Done(event.request_id, "length")
    return out


def order(number: int, generated: tuple[int, ...] = ()) -> Submit:
    rng = np.random.default_rng(number)
    return Submit(
        request_id=number,
        prompt_ids=tuple(int(i) for i in rng.integers(0, 128, 5 + 7 * number)),
        generated_ids=generated,
        max_tokens=24,
        params=SamplingParams(seed=number, temperature=1.5, top_p=0.95, frequency_penalty=0.3),
    )


def test_tokens_are_the_same_alone_in_company_and_after_a_crash(model: Path) -> None:
    alone: dict[Hashable, list[int]] = {}
    for number in range(6):
        engine = load(model, num_slots=1)
        alone |= answers(Worker(engine, prefill_chunk_tokens=1000), order(number))
        engine.close()
    assert len({tuple(ids) for ids in alone.values()}) == 6

    engine = load(model, num_slots=4, threads=2)
    worker = Worker(engine, prefill_chunk_tokens=8)
    assert answers(worker, *(order(number) for number in range(6))) == alone
    engine.close()

    engine = load(model, num_slots=3, threads=3)  # a new process, with other company
    worker = Worker(engine, prefill_chunk_tokens=16)
    for cut in (1, 11, 23):
        resumed = answers(worker, *(order(n, tuple(alone[n][:cut])) for n in range(6)))
        assert resumed == {number: ids[cut:] for number, ids in alone.items()}
    engine.close()


def test_damaged_weights_end_a_request_with_an_error(tmp_path: Path) -> None:
    tensors = llama_tensors()
    broken = tensors["output_norm.weight"][0].copy()
    broken[3] = np.nan
    tensors["output_norm.weight"] = (broken, "F32")
    engine = load(write_gguf(tmp_path / "nan.gguf", tensors))
    worker = Worker(engine)
    worker.submit(order(0))
    (event,) = worker.step()
    assert isinstance(event, Done)
    assert event.reason == "error"
    assert "NaN" in event.text
    assert worker.idle
    engine.close()


def test_files_that_are_no_models(tmp_path: Path, model: Path) -> None:
    with pytest.raises(NoSuchModel):
        load(tmp_path / "nothing.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(CorruptModel):
        load(cut)


def test_what_was_warmed_up_is_what_an_engine_runs(model: Path) -> None:
    warm_up()
    load(model).close()
    assert len(run_step.signatures) == 1  # type: ignore[attr-defined]


def test_memory_is_counted_and_a_refusal_says_how_much(model: Path) -> None:
    small, large = load(model, num_slots=1), load(model, num_slots=3)
    page_tokens = 2 * 2 * 2 * 16 * 4  # layers, heads, keys and values, head_dim, float32
    assert large.memory_bytes - small.memory_bytes >= 2 * 128 * page_tokens
    small.close()
    large.close()
    with pytest.raises(OutOfMemory, match=r"keys and values of \d+ tokens.* GiB"):
        KvCache(
            num_layers=1000,
            num_kv_heads=1000,
            head_dim=1024,
            context_tokens=1 << 30,
            num_slots=8,
            num_pages=8 << 24,
        )


def test_the_cache_holds_what_was_computed(model: Path) -> None:
    """Keys and values of a position do not depend on how it got there."""
    checkpoint = open_checkpoint(model)
    one, two = (
        CpuStage.load(
            checkpoint,
            whole(checkpoint.spec),
            context_tokens=96,
            num_slots=4,
            threads=1,
            on_progress=lambda done, total: None,
        )
        for _ in range(2)
    )
    ids = tuple(range(70))  # over the edge of a page
    one.run([Row(0, ids, 0)], None, None)
    for position in ids:
        two.run([Row(3, (position,), position)], None, None)
    for part in ("keys", "values"):
        for layer in (0, 1):
            a = getattr(one._cache, part)(0, layer, 1, 70)
            b = getattr(two._cache, part)(3, layer, 1, 70)
            assert a.shape == (70, 16)
            assert np.array_equal(a, b)
            assert (a != 0).any(axis=1).all()
    one.close()
    two.close()


def test_the_benches_print_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt-tokens", "40", "--decode-tokens", "8", "--slots", "2"]
    bench_engine.main([str(model), *options])
    result = json.loads(capsys.readouterr().out)
    assert result["device"] == "cpu:0"
    assert result["decode_tokens_per_s"] > 0
    assert result["prefill_tokens_per_s"] > 0
    options = ["--prompt-tokens", "40", "--answer-tokens", "4", "--quiet-steps", "5"]
    bench_batching.main([str(model), "--streams", "1,2", *options])
    result = json.loads(capsys.readouterr().out)
    assert set(result["tokens_per_s"]) == {"1", "2"}
    assert result["inter_token"]["ratio_p50"] > 0
    with pytest.raises(RuntimeError, match="the measuring process failed"):
        batching.run(model / "nothing", [])
    with pytest.raises(RuntimeError, match="the measuring process failed"):
        engine_speed.run(model / "nothing", threads=1, device="cpu")
