"""One rank of a mesh in a process of its own, as a port loads it: lines of JSON in and out.

Answers ``{"prepare": host}`` with its place, ``{"load": order}`` with its facts; then a follower
follows until its head is gone, and the head answers ``{"generate": [ids, ...], "count": n}`` with
the greedy tokens of each prompt, all at once or ``in_turn``, and how many of its own were cached.
An error is answered with its type and text.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from bridge.term import Atom
from compute.follower import Follower
from compute.loading import Loaded, facts, load
from compute.places import Listeners, place_term
from compute.requests import LoadOrder
from compute.sampler import SamplingParams
from compute.worker import Submit, Token, Worker


class Rank:
    """Owns what was prepared and loaded."""

    def __init__(self) -> None:
        self.listeners: Listeners | None = None
        self.loaded: Loaded | None = None

    def answer(self, command: dict[str, Any]) -> Any:
        if "prepare" in command:
            self.listeners = Listeners(command["prepare"])
            return place_term(self.listeners.place)
        if "load" in command:
            order = LoadOrder.from_term({Atom(key): v for key, v in command["load"].items()})
            self.loaded = load(order, self.listeners, lambda done, total: None)
            return facts(self.loaded.stage)
        return self.generate(command)

    def generate(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.loaded is not None
        assert self.loaded.engine is not None
        worker = Worker(self.loaded.engine, prefill_chunk_tokens=command.get("chunk", 64))
        answers: list[list[int]] = [[] for _ in command["generate"]]
        cached = [0] * len(answers)
        start_s = time.perf_counter()
        for number, ids in enumerate(command["generate"]):
            worker.submit(
                Submit(
                    request_id=number,
                    prompt_ids=tuple(ids),
                    max_tokens=command["count"],
                    params=SamplingParams(temperature=0),
                )
            )
            last = number == len(answers) - 1
            while not worker.idle and (last or command.get("in_turn")):
                for event in worker.step():
                    assert isinstance(event.request_id, int)
                    if isinstance(event, Token):
                        answers[event.request_id].append(event.token_id)
                    else:
                        cached[event.request_id] = event.cached_tokens
        return {"ids": answers, "cached": cached, "seconds": time.perf_counter() - start_s}

    def follow(self) -> None:
        assert self.loaded is not None
        follower = Follower(self.loaded.stage, self.loaded.links)
        while True:
            follower.step()


def main() -> None:
    """Serve every line."""
    rank = Rank()
    for line in sys.stdin:
        try:
            found = rank.answer(json.loads(line))
        except Exception as exc:  # noqa: BLE001 - told to the test
            found = {"error": type(exc).__name__, "text": str(exc), "at_s": time.monotonic()}
        print(json.dumps(found), flush=True)
        if rank.loaded is not None and rank.loaded.engine is None:
            try:
                rank.follow()
            except Exception as exc:  # noqa: BLE001 - told to the test
                lost = {"error": type(exc).__name__, "text": str(exc), "at_s": time.monotonic()}
                print(json.dumps(lost), flush=True)
                return


if __name__ == "__main__":
    main()
