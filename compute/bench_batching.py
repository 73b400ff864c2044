"""Measures batching in this process: ``python -m compute.bench_batching MODEL [options]``.

Prints one JSON object: tokens a second of some numbers of streams, and how long running streams
wait from token to token while nothing else happens, and while a long prompt arrives.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from compute.engine import load_engine
from compute.sampler import SamplingParams
from compute.worker import Done, Submit, Token, Worker
from models.checkpoint import open_checkpoint


class Streams:
    """A worker, and when each token of each request came."""

    def __init__(self, worker: Worker, vocab_size: int) -> None:
        self._worker, self._vocab_size = worker, vocab_size
        self.times_s: dict[Hashable, list[float]] = {}
        self.begun_s: dict[Hashable, float] = {}
        self.done: set[Hashable] = set()

    def submit(self, name: str, prompt_tokens: int, answer_tokens: int) -> None:
        """A greedy request with a prompt of random tokens that no other request has."""
        rng = np.random.default_rng([ord(letter) for letter in name])
        self.begun_s[name], self.times_s[name] = time.perf_counter(), []
        self._worker.submit(
            Submit(
                request_id=name,
                prompt_ids=tuple(int(i) for i in rng.integers(0, self._vocab_size, prompt_tokens)),
                max_tokens=answer_tokens,
                params=SamplingParams(temperature=0),
            )
        )

    def step(self) -> None:
        """One step, and what came of it."""
        events = self._worker.step()
        now_s = time.perf_counter()
        for event in events:
            if isinstance(event, Token):
                self.times_s[event.request_id].append(now_s)
            elif isinstance(event, Done):
                self.done.add(event.request_id)

    def first_token_s(self, name: str) -> float:
        """From arrival on."""
        return self.times_s[name][0] - self.begun_s[name]

    def drain(self) -> None:
        """Step until nobody is left."""
        while not self._worker.idle:
            self.step()


def throughput(streams: Streams, count: int, answer_tokens: int) -> float:
    """Tokens a second of ``count`` streams that all decode."""
    names = [f"{count} streams, {number}" for number in range(count)]
    for name in names:
        streams.submit(name, 24, answer_tokens)
    while not all(streams.times_s[name] for name in names):
        streams.step()
    begin_s = time.perf_counter()
    before = sum(len(streams.times_s[name]) for name in names)
    while not streams.done.intersection(names):
        streams.step()
    tokens = sum(len(streams.times_s[name]) for name in names) - before
    speed = tokens / (time.perf_counter() - begin_s)
    streams.drain()
    return speed


def gaps_s(streams: Streams, names: list[str], since_s: float) -> list[float]:
    """Waits from token to token of some streams, those that ended after ``since_s``."""
    return [
        later - earlier
        for name in names
        for earlier, later in zip(streams.times_s[name], streams.times_s[name][1:], strict=False)
        if later > since_s
    ]


def latency(
    streams: Streams, *, num_streams: int, prompt_tokens: int, quiet_steps: int
) -> dict[str, Any]:
    """Waits of running streams without and with a long prompt; a short one comes behind it."""
    names = [f"stream {number}" for number in range(num_streams)]
    for name in names:
        streams.submit(name, 16, 1 << 20)
    while not all(streams.times_s[name] for name in names):
        streams.step()
    quiet_s = time.perf_counter()
    for _ in range(quiet_steps):
        streams.step()
    quiet = gaps_s(streams, names, quiet_s)
    busy_s = time.perf_counter()
    streams.submit("long", prompt_tokens, 2)
    streams.step()
    streams.submit("short", 20, 2)
    while not (streams.times_s["long"] and streams.times_s["short"]):
        streams.step()
    busy = gaps_s(streams, names, busy_s)
    if not quiet or not busy:
        raise ValueError("the streams ended too soon to be timed: the context is too short")
    return {
        "quiet_ms": summary_ms(quiet),
        "busy_ms": summary_ms(busy),
        "ratio_p50": round(float(np.median(busy) / np.median(quiet)), 2),
        "ratio_p99": round(float(np.quantile(busy, 0.99) / np.quantile(quiet, 0.99)), 2),
        "long_first_token_s": round(streams.first_token_s("long"), 3),
        "short_first_token_s": round(streams.first_token_s("short"), 3),
    }


def summary_ms(waits_s: list[float]) -> dict[str, float]:
    """Median, tail and largest."""
    points = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: round(float(np.quantile(waits_s, at)) * 1e3, 1) for name, at in points.items()}


def main(arguments: list[str] | None = None) -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(prog="compute.bench_batching", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file or a folder with safetensors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", default="1,4,16", help="numbers of streams, with commas")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="of the long prompt")
    parser.add_argument("--quiet-steps", type=int, default=60)
    parser.add_argument("--slots", type=int, default=4)
    given = parser.parse_args(arguments)
    engine = load_engine(
        given.model,
        context_tokens=min(
            given.prompt_tokens + 1024, open_checkpoint(given.model).spec.context_length
        ),
        num_slots=given.slots,
        threads=given.threads,
        device=given.device,
    )
    streams = Streams(Worker(engine), engine.spec.vocab_size)
    throughput(streams, 2, 8)
    result: dict[str, Any] = {
        "model": given.model.name,
        "device": engine.device,
        "threads": given.threads,
        "tokens_per_s": {
            count: round(throughput(streams, int(count), given.answer_tokens), 1)
            for count in given.streams.split(",")
        },
        "inter_token": latency(
            streams,
            num_streams=2,
            prompt_tokens=given.prompt_tokens,
            quiet_steps=given.quiet_steps,
        ),
    }
    engine.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
