"""One rank of ``compute.bench_memory``: told what to load on standard input, reports on output.

Both are JSON lines: first the rank says where it can be met, then it gets its load order, loads,
fills its slots (as head) or follows, and says what it took.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import compute.port  # noqa: F401  # what a port has in memory is to be in this one
from compute.engine import Row, StageEngine, warm_up
from compute.errors import PeerLost
from compute.follower import Follower
from compute.loading import Loaded, load
from compute.places import Listeners
from compute.requests import LoadOrder
from compute.sampler import SamplingParams, sample
from compute.stage import MAX_POSITIONS
from models.checkpoint import open_checkpoint
from models.footprint import footprint, kernels_for
from models.memory import stored_bytes


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident memory of this process in bytes: now, and at most since ``forget_peak``."""

    now: int
    peak: int

    @classmethod
    def read(cls) -> Self:
        """Source: Linux ``proc(5)``, ``/proc/pid/status``."""
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
        return cls(sizes["VmRSS:"], sizes["VmHWM:"])


def forget_peak() -> None:
    """Let the peak begin again at what is resident now. Source: ``proc(5)``, clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Be a rank."""
    warm_up()
    listeners = Listeners("127.0.0.1")
    place = listeners.place
    _say({"host": place.host, "ports": dict(place.ports)})
    order = LoadOrder(instance="bench", epoch=1, **json.loads(sys.stdin.readline()))
    _import_engine(order)
    before = Resident.read().now
    forget_peak()
    reading = 0

    def note(done: int, total: int) -> None:
        nonlocal reading
        reading = Resident.read().peak

    loaded = load(order, listeners, note)
    after = Resident.read()
    if loaded.engine is not None:
        _fill(loaded.engine)
    else:
        _follow(loaded)
    full = Resident.read()
    if loaded.engine is not None:
        loaded.engine.close()  # which the others see
    sizes = {"reading": reading, "loading": after.peak, "loaded": after.now, "full": full.now}
    _say({"rank": order.rank, "before": before, **sizes, **_figures(order, loaded)})
    sys.stdin.readline()  # the others may still need this one


def _import_engine(order: LoadOrder) -> None:
    """Have libraries in memory before anything is measured: they are no part of a model."""
    kernels = kernels_for(open_checkpoint(Path(order.path)).spec, order.device)
    if kernels == "torch":
        import compute.torch.engine
    elif kernels == "mlx":
        import compute.mlx.stage  # noqa: F401


def _fill(engine: StageEngine) -> None:
    """Run tokens through every position of every slot, and draw a token of each."""
    slots, last = range(engine.num_slots), engine.context_tokens - 1
    for start in range(0, last, MAX_POSITIONS):
        ids = tuple(at % 100 for at in range(start, min(start + MAX_POSITIONS, last)))
        for slot in slots:
            engine.forward([Row(slot, ids, start, want_logits=False)])
    logits = engine.forward([Row(slot, (0,), last) for slot in slots])
    for row in logits:
        sample(row, SamplingParams(temperature=1.0), (), (), 0)


def _follow(loaded: Loaded) -> None:
    """Run what the head orders until it leaves."""
    follower = Follower(loaded.stage, loaded.links)
    try:
        while True:
            follower.step()
    except PeerLost:
        return


def _figures(order: LoadOrder, loaded: Loaded) -> dict[str, int]:
    checkpoint = open_checkpoint(Path(order.path))
    stage = loaded.stage
    estimate = footprint(
        checkpoint.spec,
        checkpoint,
        stage.shard,
        kernels=kernels_for(checkpoint.spec, order.device),
        device="mlx-cpu" if stage.kernels == "mlx" else order.device,
        context_tokens=stage.context_tokens,
        num_slots=stage.num_slots,
        threads=order.threads,
    )
    return {
        "slice_in_file": stored_bytes(checkpoint.spec, checkpoint, stage.shard),
        "slice_in_memory": stage.weights_bytes,
        "idle_estimate": estimate.process_bytes,
        "estimate": estimate.total_bytes,
    }


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
