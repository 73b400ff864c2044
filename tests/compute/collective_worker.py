"""One rank in a process of its own, driven by lines of JSON: ``python -m ... collective_worker``.

Commands: ``{"join": {...}}``, ``{"op": name, ...}``, ``{"close": true}``, ``{"listen": true}``.
Every line is answered by one; an error by ``{"error": type name, ...}``.
"""

from __future__ import annotations

import base64
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from compute.collectives import Group, Rendezvous, join
from compute.errors import JoinRefused, PeerLost


def make(seed: int, rank: int, shape: list[int], dtype: str) -> npt.NDArray[Any]:
    """What a rank brings: the same on every call."""
    numbers = np.random.default_rng([seed, rank]).standard_normal(shape)
    return (numbers * 100).astype(dtype)


class Worker:
    """Owns at most one group and one listening socket."""

    def __init__(self) -> None:
        self.group: Group | None = None
        self.listener: socket.socket | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if "listen" in command:
            self.listener = socket.create_server(("127.0.0.1", 0))
            return {"tcp_port": self.listener.getsockname()[1]}
        if "join" in command:
            options = command["join"]
            options["hosts"] = tuple(options["hosts"])
            options["address"] = ("127.0.0.1", options.pop("tcp_port"))
            options["ring"] = tuple(("127.0.0.1", port) for port in options.pop("ring", []))
            backend, listener = options.pop("backend"), self.listener
            self.listener = None
            if self.group is not None:
                self.group.close()
            self.group = None
            self.group = join(Rendezvous(**options), backend=backend, listener=listener)
            return {"rank": self.group.rank, "backend": self.group.backend}
        assert self.group is not None
        if "close" in command:
            self.group.close()
            return {}
        return self._operate(self.group, command)

    def _operate(self, group: Group, command: dict[str, Any]) -> dict[str, Any]:
        rank, timeout_s = group.rank, command.get("timeout_s", 20.0)
        times = command.get("times", 1)
        shapes = command.get("shapes") or [command.get("shape", [1])] * group.world_size
        x = make(command.get("seed", 0), rank, shapes[rank], command.get("dtype", "float32"))
        given: Any = x
        if command.get("torch"):
            import torch

            given = torch.from_numpy(x)
        out: list[Any] = [x]
        for _ in range(times):
            match command["op"]:
                case "all_reduce_sum":
                    result = group.all_reduce_sum(given, timeout_s=timeout_s)
                    assert result is given
                case "all_gather":
                    tuples = [tuple(shape) for shape in shapes]
                    out = group.all_gather(given, shapes=tuples, timeout_s=timeout_s)
                case "broadcast":
                    group.broadcast(given, root=command["root"], timeout_s=timeout_s)
                case "swap":  # with a rank; the lower one sends first
                    peer = command["with"]
                    if peer is not None and rank < peer:
                        group.send(given, to=peer, timeout_s=timeout_s)
                        group.receive(given, source=peer, timeout_s=timeout_s)
                    elif peer is not None:
                        theirs = np.empty_like(x)
                        group.receive(theirs, source=peer, timeout_s=timeout_s)
                        group.send(given, to=peer, timeout_s=timeout_s)
                        out = [theirs]
                case "barrier":
                    group.barrier(timeout_s=timeout_s)
                case "for_ever":  # until a peer is lost
                    again = self._repeated(group, command.get("of", "all_reduce_sum"), x)
                    again(20.0)
                    print(json.dumps({"started": True}), flush=True)
                    while True:
                        again(timeout_s)
                case other:
                    raise AssertionError(other)
        arrays = [np.ascontiguousarray(a) for a in out]
        return {"bits": [base64.b64encode(a.tobytes()).decode() for a in arrays]}

    @staticmethod
    def _repeated(group: Group, name: str, x: npt.NDArray[np.float32]) -> Callable[[float], object]:
        """An operation in which rank 0 waits for rank 1, by its limit in seconds.

        With ``receive`` the former receives what the latter sends, with ``send`` the reverse.
        """

        def all_reduce(timeout_s: float) -> None:
            x[:] = 1
            group.all_reduce_sum(x, timeout_s=timeout_s)

        def send(timeout_s: float) -> None:
            group.send(x, to=1 - group.rank, timeout_s=timeout_s)

        def receive(timeout_s: float) -> None:
            group.receive(x, source=1 - group.rank, timeout_s=timeout_s)

        pair = [receive, send]
        return {
            "all_reduce_sum": all_reduce,
            "all_gather": lambda timeout_s: group.all_gather(x, timeout_s=timeout_s),
            "broadcast": lambda timeout_s: group.broadcast(x, root=1, timeout_s=timeout_s),
            "barrier": lambda timeout_s: group.barrier(timeout_s=timeout_s),
            "receive": pair[group.rank % 2],
            "send": pair[1 - group.rank % 2],
        }[name]


def main() -> None:
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except PeerLost as exc:
            answer = {"error": "PeerLost", "rank": exc.rank, "why": exc.why}
        except (JoinRefused, ValueError) as exc:
            answer = {"error": type(exc).__name__, "why": str(exc)}
        answer["clock_s"] = time.monotonic()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
