"""Speed of a running node as its clients see it: prefill, decode, batch, and recovery.

Everything goes over HTTP with greedy decoding; figures are medians. A run's figures are
ratios' raw material: compare only what was measured in turn on the same quiet machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 300.0
FIRST_ID = 1000  # ordinary tokens in every vocabulary of today; what they mean does not matter
DONE = "data: [DONE]"
MIN_TOKENS = 8
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        prompt_tokens: length of the prefill prompt.
        decode_tokens: length of each decode run.
        batches: numbers of streams at once.
        runs: repetitions of each; the median is reported.
        chaos: how often to kill a rank while it generates.
    """

    prompt_tokens: int = 500
    decode_tokens: int = 64
    batches: tuple[int, ...] = (4, 8)
    runs: int = 3
    chaos: int = 0


class TooShort(Exception):
    """The model ended its answer before there was anything to time."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens)
        self.num_tokens = num_tokens

    def __str__(self) -> str:
        return (
            f"the model ended its answer after {self.num_tokens} tokens, {MIN_TOKENS} are needed "
            "to time it; measure a base or another model"
        )


@dataclass(slots=True)
class Report:
    """Figures of one run. Speeds are tokens a second, pauses seconds."""

    model: str
    prefill: float = 0.0
    decode: float = 0.0
    first_token_s: float = 0.0
    batch: dict[int, float] = field(default_factory=dict)
    recovery_s: list[float] = field(default_factory=list)
    changed_streams: int = 0  # streams that differ from the undisturbed one

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["recovery_median_s"] = statistics.median(self.recovery_s) if self.recovery_s else None
        data["recovery_max_s"] = max(self.recovery_s, default=None)
        return data


@dataclass(frozen=True, slots=True)
class Timed:
    """One stream: its text, and when each piece of it came."""

    text: str
    times_s: tuple[float, ...]
    started_s: float

    def first_token_s(self) -> float:
        return self.times_s[0] - self.started_s

    def tokens_a_second(self) -> float:
        if len(self.times_s) < MIN_TOKENS:
            raise TooShort(len(self.times_s))
        return (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])


async def run(
    url: str,
    model: str,
    plan: Plan,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure the node at ``url``.

    Args:
        say: told what is measured now.

    Raises:
        httpx.HTTPError: the node does not answer, or answers with an error.
    """
    report = Report(model)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        say("warming up")
        await _stream(client, model, _prompt(16, 0), 8)
        say("prefill and time to first token")
        prefills = [
            await _stream(client, model, _prompt(plan.prompt_tokens, 1 + n), 1)
            for n in range(plan.runs)
        ]
        report.prefill = plan.prompt_tokens / statistics.median(t.first_token_s() for t in prefills)
        say("decode")
        decodes = [
            await _stream(client, model, _story(n), plan.decode_tokens) for n in range(plan.runs)
        ]
        report.decode = statistics.median(t.tokens_a_second() for t in decodes)
        report.first_token_s = statistics.median(t.first_token_s() for t in decodes)
        for size in plan.batches:
            say(f"{size} streams at once")
            report.batch[size] = await _batch(client, model, size, plan.decode_tokens)
        if plan.chaos:
            await _chaos(client, model, plan, report, say)
    return report


async def _batch(client: httpx.AsyncClient, model: str, size: int, tokens: int) -> float:
    """Tokens a second of all streams together, from the first token to the last."""
    streams = await asyncio.gather(
        *(_stream(client, model, _story(100 + n), tokens) for n in range(size))
    )
    times_s = sorted(t for stream in streams for t in stream.times_s)
    return (len(times_s) - 1) / (times_s[-1] - times_s[0])


async def _chaos(
    client: httpx.AsyncClient,
    model: str,
    plan: Plan,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """Kill a rank in the middle of a stream, ``plan.chaos`` times; the text must not change."""
    prompt = _story(0)
    undisturbed = await _stream(client, model, prompt, plan.decode_tokens)
    for n in range(plan.chaos):
        say(f"kill {n + 1} of {plan.chaos}")
        victim = await _rank_pid(client)
        killed_s = 0.0

        def kill_in_the_middle(count: int, victim: int = victim) -> None:
            nonlocal killed_s
            if count == len(undisturbed.times_s) // 2:
                killed_s = asyncio.get_running_loop().time()
                os.kill(victim, getattr(signal, "SIGKILL", signal.SIGTERM))

        stream = await _stream(client, model, prompt, plan.decode_tokens, kill_in_the_middle)
        after = [t for t in stream.times_s if t > killed_s]
        pauses = [b - a for a, b in zip([killed_s, *after], after, strict=False)]
        report.recovery_s.append(max(pauses, default=0.0))
        report.changed_streams += stream.text != undisturbed.text


async def _rank_pid(client: httpx.AsyncClient) -> int:
    """OS pid of the first rank of the first ready instance, waiting for one that recovers."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            status = (await client.get("/cluster/status")).raise_for_status().json()
            for instance in status["instances"]:
                if instance["state"] == "ready":
                    return int(instance["ranks"][0]["os_pid"])
            await asyncio.sleep(POLL_S)


def _prompt(length: int, variant: int) -> list[int]:
    """Token ids that no other variant shares a prefix with, so that no cache helps."""
    return [FIRST_ID + variant * 7 % 20000, *(FIRST_ID + n * 37 % 20000 for n in range(1, length))]


def _story(variant: int) -> str:
    """A text that models continue at length."""
    return f"Chapter {variant + 1}. Once upon a time, in a small house by the river, there lived"


async def _stream(
    client: httpx.AsyncClient,
    model: str,
    prompt: list[int] | str,
    max_tokens: int,
    on_token: Callable[[int], None] = lambda count: None,
) -> Timed:
    """One greedy completion of at most ``max_tokens`` tokens, with a time for each."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "logprobs": 0,  # so that every token has a piece of its own, also one without text
    }
    clock = asyncio.get_running_loop().time
    started_s = clock()
    text, times_s = "", []
    async for piece in _pieces(client, body):
        tokens = (piece["choices"][0].get("logprobs") or {}).get("tokens", [])
        text += piece["choices"][0]["text"]
        for _ in tokens:
            times_s.append(clock())
            on_token(len(times_s))
    return Timed(text, tuple(times_s), started_s)


async def _pieces(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            await response.aread()
            raise httpx.HTTPStatusError(
                f"{response.status_code}: {response.text[:300]}",
                request=response.request,
                response=response,
            )
        async for line in response.aiter_lines():
            if line.startswith("data:") and line != DONE:
                yield json.loads(line[5:])
