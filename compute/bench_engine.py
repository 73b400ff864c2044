"""Measures one engine in this process: ``python -m compute.bench_engine MODEL [options]``.

Prints one JSON object: load time with imports, prefill and decode speed, memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from compute.engine import Row, StageEngine, load_engine


def peak_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(engine: StageEngine, *, prompt_tokens: int, decode_tokens: int) -> dict[str, Any]:
    """Speed of an engine with a prompt of random tokens.

    Returns:
        Tokens per second: prefill (best of three) and decode behind that prompt, as the median
        and as the mean of all steps; and decode of a whole batch, all slots together.
    """
    rng = np.random.default_rng(0)
    prompt = tuple(int(i) for i in rng.integers(0, engine.spec.vocab_size, prompt_tokens))
    prefill_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        logits = engine.forward([Row(0, prompt, 0)])
        prefill_s.append(time.perf_counter() - start_s)
    step_s = []
    for position in range(prompt_tokens, prompt_tokens + decode_tokens):
        row = Row(0, (int(logits[0].argmax()),), position)
        start_s = time.perf_counter()
        logits = engine.forward([row])
        step_s.append(time.perf_counter() - start_s)
    batch_s = []
    for slot in range(1, engine.num_slots):
        engine.forward([Row(slot, prompt, 0, want_logits=False)])
    for position in range(prompt_tokens, prompt_tokens + decode_tokens // 4):
        rows = [Row(slot, (position % 100,), position) for slot in range(engine.num_slots)]
        start_s = time.perf_counter()
        engine.forward(rows)
        batch_s.append(time.perf_counter() - start_s)
    return {
        "prefill_tokens_per_s": round(prompt_tokens / min(prefill_s), 1),
        "decode_tokens_per_s": round(1 / statistics.median(step_s), 1),
        "decode_mean_tokens_per_s": round(1 / statistics.mean(step_s), 1),
        "batch_slots": engine.num_slots,
        "batch_tokens_per_s": round(engine.num_slots / statistics.median(batch_s), 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(prog="compute.bench_engine", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file or a folder with safetensors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=8)
    given = parser.parse_args(arguments)
    start_s = time.perf_counter()
    engine = load_engine(
        given.model,
        context_tokens=given.prompt_tokens + given.decode_tokens,
        num_slots=given.slots,
        threads=given.threads,
        device=given.device,
    )
    load_s = time.perf_counter() - start_s
    result: dict[str, Any] = {
        "model": given.model.name,
        "device": engine.device,
        "threads": given.threads,
        "prompt_tokens": given.prompt_tokens,
        "load_s": round(load_s, 2),
        "loaded_rss_bytes": peak_bytes(),
        "engine_memory_bytes": engine.memory_bytes,
    }
    result |= measure(engine, prompt_tokens=given.prompt_tokens, decode_tokens=given.decode_tokens)
    result["peak_rss_bytes"] = peak_bytes()
    engine.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
