"""Asks a running server what its own API description allows, and what it does not allow.

The longer run, by hand, against any node: ``python -m tests.control.gateway.api_fuzz URL EXAMPLES
MODEL [KEY]``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

ENDLESS = ("/cluster/events",)  # a feed
TIMEOUT_S = 30.0


@dataclass
class Findings:
    """``codes``: how often which status came, by route; ``failures``: every 5xx, in words."""

    codes: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def fuzz(
    url: str, *, examples: int, model: str, key: str = "", derandomize: bool = True
) -> Findings:
    """Ask every route ``examples`` times with what it allows, and as often with what it does not.

    Args:
        model: put in the place of every second name of a model, so that some answers are made.
    """
    headers = {"x-api-key": key} if key else {}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    found = Findings()
    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )

    def ask(case: Any, codes: Counter[int]) -> None:
        body = case.body
        if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body) % 2:
            case.body = {**body, "model": model}
        answer = case.call(headers=headers, timeout=TIMEOUT_S)
        codes[answer.status_code] += 1
        if answer.status_code >= 500:
            asked = f"{case.method} {case.formatted_path} {case.body!r:.300}"
            found.failures.append(f"{answer.status_code} to {asked}: {answer.text:.300}")

    operations: list[Any] = list(schema.get_all_operations())
    for operation in (one.ok() for one in operations):
        if operation.path in ENDLESS:
            continue
        codes = found.codes.setdefault(operation.label, Counter())
        modes = [GenerationMode.POSITIVE]
        if operation.body:  # what a path or a GET may not be is only another path
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:
            given_ = given(case=operation.as_strategy(generation_mode=mode))
            limits(given_(_asking(ask, codes)))()
    return found


def _asking(ask: Callable[[Any, Counter[int]], None], codes: Counter[int]) -> Callable[..., None]:
    def attempt(case: Any) -> None:
        ask(case, codes)

    return attempt


if __name__ == "__main__":
    last = fuzz(
        sys.argv[1],
        examples=int(sys.argv[2]),
        model=sys.argv[3],
        key="".join(sys.argv[4:5]),
        derandomize=False,
    )
    for route, seen in last.codes.items():
        print(route, dict(sorted(seen.items())))
    print(sum(sum(seen.values()) for seen in last.codes.values()), "requests")
    print(len(last.failures), "failures", *last.failures[:20], sep="\n")
