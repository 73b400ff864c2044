"""Measures the memory of real ranks: ``python -m compute.bench_memory MODEL [options]``.

Every rank of a mesh is an OS process that has imported what a port imports and loads as a port
does. Per rank: its peak while loading, and what is resident once every slot is full, beside the
estimate by which models are placed. Reads ``/proc``, so Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import secrets
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP_S = 600.0  # for all ranks to do one of the things that they do together


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is loaded: as in ``compute.requests.LoadOrder``."""

    path: str
    tensor: int = 1
    pipeline: int = 1
    shares: tuple[float, ...] = ()
    context_tokens: int = 512
    num_slots: int = 4
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What one rank took; all in bytes, resident memory of its whole process where not said.

    Attributes:
        slice_in_file, slice_in_memory: of the rank's weights.
        before: with everything imported and nothing loaded.
        reading: at most until the last weight was read; resident pages of the mapped file count.
        loading: at most until all ranks had met and run a first step.
        loaded: after that.
        full: with every slot full.
        idle_estimate, estimate: of ``before`` and ``full``, by ``models.footprint``.
    """

    rank: int
    slice_in_file: int
    slice_in_memory: int
    before: int
    reading: int
    loading: int
    loaded: int
    full: int
    idle_estimate: int
    estimate: int

    @property
    def peak_ratio(self) -> float:
        """Growth at the worst moment of reading, over the slice in memory."""
        return (self.reading - self.before) / self.slice_in_memory

    @property
    def estimate_ratio(self) -> float:
        """Estimated over measured memory of the process."""
        return self.estimate / self.full

    @property
    def model_ratio(self) -> float:
        """The same without what the process takes before it loads."""
        return (self.estimate - self.idle_estimate) / (self.full - self.before)


async def measure(setting: Setting) -> list[RankMemory]:
    """Load a mesh, fill its slots, and measure; in rank order.

    Raises:
        RuntimeError: a rank failed, with what it said.
        TimeoutError: the ranks took too long for one step.
    """
    # Compiles what is not yet compiled, and brings the file into memory.
    await _run(dataclasses.replace(setting, context_tokens=64, num_slots=1))
    return await _run(setting)


async def _run(setting: Setting) -> list[RankMemory]:
    ranks: list[Process] = []
    command = (sys.executable, "-m", "compute.bench_memory_rank")
    try:
        for _ in range(setting.tensor * setting.pipeline):
            ranks.append(
                await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
            )
        async with asyncio.timeout(STEP_S):
            places = await asyncio.gather(*map(_answer, ranks))
        order = {**dataclasses.asdict(setting), "group": secrets.token_hex(16), "places": places}
        for rank, process in enumerate(ranks):
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "rank": rank}).encode() + b"\n")
            await process.stdin.drain()
        async with asyncio.timeout(STEP_S):
            return [RankMemory(**found) for found in await asyncio.gather(*map(_answer, ranks))]
    finally:
        for process in ranks:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def _answer(process: Process) -> Any:
    assert process.stdout is not None
    assert process.stderr is not None
    line = await process.stdout.readline()
    if not line:
        said = (await process.stderr.read()).decode(errors="replace")
        raise RuntimeError(f"a rank ended: {said[-2000:]}")
    return json.loads(line)


def table(ranks: Sequence[RankMemory]) -> str:
    """Lines to read, in MiB."""
    sizes = [field.name for field in dataclasses.fields(RankMemory) if field.name != "rank"]
    ratios = ("peak_ratio", "estimate_ratio", "model_ratio")
    lines = [
        f"| rank | {' | '.join((*sizes, *ratios))} |",
        "| ---: " * (1 + len(sizes) + len(ratios)) + "|",
    ]
    for rank in ranks:
        cells = [f"{getattr(rank, name) / 2**20:.1f}" for name in sizes]
        cells += [f"{getattr(rank, name):.3f}" for name in ratios]
        lines.append(f"| {rank.rank} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(prog="compute.bench_memory", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file or a folder with safetensors")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--shares", default="", help="of every rank, with commas")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a rank")
    given = parser.parse_args(arguments)
    setting = Setting(
        path=str(given.model.resolve()),
        tensor=given.tensor,
        pipeline=given.pipeline,
        shares=tuple(float(share) for share in given.shares.split(",") if share),
        context_tokens=given.context,
        num_slots=given.slots,
        threads=given.threads,
        device=given.device,
    )
    ranks = asyncio.run(measure(setting))
    if given.json:
        for rank in ranks:
            print(json.dumps(dataclasses.asdict(rank)))
    else:
        print(table(ranks))


if __name__ == "__main__":
    main()
