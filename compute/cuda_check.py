"""Checks the torch engine on a GPU: ``python -m compute.cuda_check [--device cuda:0]``.

Small random models of every family on the device in float32 and bfloat16 against float32 on the
CPU; a token's bits alone and in company; two gloo ranks that share the device; NCCL with one rank.
With ``--model PATH`` also the speed of a real model, and its greedy tokens against the CPU's.
Exit status: 0 all as it should be, 1 something is not, 2 no such GPU here.
"""

from __future__ import annotations

import argparse
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch

from compute.collectives import Backend, Group, Rendezvous, join
from compute.random_model import FAMILIES, RandomCheckpoint, small_spec
from compute.stage import FloatArray, Peers, Row
from compute.torch.engine import TorchStage
from models.checkpoint import Checkpoint, open_checkpoint
from models.mesh import grid, mesh, whole
from models.sharding import RankShard

EXACT = 2e-4  # of the largest logit, where everything is float32
NEAR = 0.1  # the usual error in bfloat16; a token may also choose another expert
CONTEXT_TOKENS, NUM_SLOTS = 256, 4
WAIT_S = 120.0
NUM_GREEDY = 32
TWO_RANKS = (("llama", "float32"), ("llama", "bfloat16"), ("deepseek_v3", "float32"))
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; ``good`` says whether it is as it should be."""

    good: bool
    text: str


def load(checkpoint: Checkpoint, shard: RankShard, device: str, dtype: str) -> TorchStage:
    """A rank on a device."""
    return TorchStage.load(
        checkpoint,
        shard,
        context_tokens=CONTEXT_TOKENS,
        num_slots=NUM_SLOTS,
        threads=torch.get_num_threads(),
        device=device,
        on_progress=lambda done, total: None,
        dtype=TYPES[dtype],
    )


def logits(stage: TorchStage, peers: Peers | None = None) -> FloatArray:
    """Logits behind a long chunk, a short one, and tokens that come one by one."""
    ids = np.random.default_rng(1).integers(0, stage.spec.vocab_size, 190)
    cuts = [0, 150, 170, *range(171, 191)]
    out = []
    for start, stop in pairwise(cuts):
        row = Row(1, tuple(int(i) for i in ids[start:stop]), start)
        out.append(stage.run([row], None, peers))
    return np.concatenate(out)


def errors(found: FloatArray, expected: FloatArray) -> tuple[float, float]:
    """Largest and usual difference of a row, beside its largest logit."""
    rows = np.abs(found - expected).max(-1) / np.abs(expected).max(-1)
    return float(rows.max()), float(np.median(rows))


def check_types(device: str, names: Iterable[str] = FAMILIES) -> Iterator[Finding]:
    """Both types on the device against float32 on the CPU."""
    for name in names:
        model = RandomCheckpoint(small_spec(name))
        reference = logits(load(model, whole(model.spec), "cpu", "float32"))
        wide = errors(logits(load(model, whole(model.spec), device, "float32")), reference)
        narrow = errors(logits(load(model, whole(model.spec), device, "bfloat16")), reference)
        yield Finding(
            wide[0] < EXACT and narrow[1] < NEAR,
            f"{name}: float32 {wide[0]:.1e}; bfloat16 usually {narrow[1]:.1e}, "
            f"at most {narrow[0]:.1e}",
        )


def check_company(device: str, names: Iterable[str] = FAMILIES) -> Iterator[Finding]:
    """A token's bits must not depend on the other rows of its step."""
    for name in names:
        model = RandomCheckpoint(small_spec(name))
        stage = load(model, whole(model.spec), device, "bfloat16")
        prompt, others = tuple(range(40, 77)), [Row(2, tuple(range(90)), 0), Row(3, (5,), 0)]
        alone = [stage.run([row], None, None)[0] for row in (Row(0, prompt, 0), Row(0, (9,), 37))]
        same = [
            np.array_equal(stage.run([*others, row], None, None)[2], expected)
            for row, expected in zip((Row(0, prompt, 0), Row(0, (9,), 37)), alone, strict=True)
        ]
        text = "the same bits" if all(same) else f"chunk {same[0]}, token {same[1]}: other bits"
        yield Finding(all(same), f"{name}: {text} alone and in company")


def check_two_ranks(device: str, cases: Iterable[tuple[str, str]] = TWO_RANKS) -> Iterator[Finding]:
    """Two processes, one device, partial sums over gloo; against one rank there."""
    for name, dtype in cases:
        model = RandomCheckpoint(small_spec(name))
        expected = logits(load(model, whole(model.spec), device, dtype))
        instance = secrets.token_hex(8)
        listener = socket.create_server(("127.0.0.1", 0))
        tcp_port = listener.getsockname()[1]
        command = [sys.executable, "-m", "compute.cuda_check", "--device", device, "--second"]
        other = subprocess.Popen([*command, f"{name},{dtype},{instance},{tcp_port}"])
        try:
            found = as_rank(0, name, dtype, device, instance, tcp_port, listener)
            ended = other.wait(WAIT_S)
        finally:
            if other.poll() is None:
                other.kill()
                other.wait()
        worst, usual = errors(found, expected)
        good = ended == 0 and (worst < EXACT if dtype == "float32" else usual < NEAR)
        yield Finding(good, f"{name}, {dtype}: two gloo ranks differ from one by {worst:.1e}")


def as_rank(
    rank: int,
    name: str,
    dtype: str,
    device: str,
    instance: str,
    tcp_port: int,
    listener: socket.socket | None = None,
) -> FloatArray:
    """Logits of a model over two ranks, as one of them."""
    model = RandomCheckpoint(small_spec(name))
    shards = mesh(model.spec, grid((1, 1)), split_embedding=True)
    stage = load(model, shards[rank], device, dtype)
    group = _join("gloo", rank, 2, device, instance, tcp_port, listener)
    try:
        return logits(stage, _peers(group, shards))
    finally:
        group.close()


def check_nccl(device: str) -> Iterator[Finding]:
    """Sums and gathers of one rank by NCCL change nothing."""
    model = RandomCheckpoint(small_spec("llama"))
    shards = mesh(model.spec, grid((1,)), split_embedding=True)
    stage = load(model, shards[0], device, "bfloat16")
    expected = logits(stage)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tcp_port = listener.getsockname()[1]
        group = _join("nccl", 0, 1, device, secrets.token_hex(8), tcp_port, listener)
        try:
            same = np.array_equal(logits(stage, _peers(group, shards)), expected)
        finally:
            group.close()
    yield Finding(same, f"llama: NCCL with one rank gives {'the same' if same else 'other'} bits")


def check_model(device: str, path: Path) -> Iterator[Finding]:
    """Speed of a real model in bfloat16, and how long its greedy tokens are the CPU's."""
    checkpoint = open_checkpoint(path)
    told = []
    prompt = tuple(checkpoint.tokenizer().encode("The quick brown fox jumps over the lazy dog. "))
    for where, dtype in (("cpu", "float32"), (device, "bfloat16")):
        stage = load(checkpoint, whole(checkpoint.spec), where, dtype)
        row = Row(0, prompt, 0)
        tokens: list[int] = []
        start_s = time.perf_counter()
        for at in range(NUM_GREEDY):
            if at == 1:
                start_s = time.perf_counter()
            tokens.append(int(stage.run([row], None, None)[0].argmax()))
            row = Row(0, (tokens[-1],), len(prompt) + at)
        told.append((tokens, (NUM_GREEDY - 1) / (time.perf_counter() - start_s)))
        stage.close()
    same = [a == b for a, b in zip(told[0][0], told[1][0], strict=True)]
    length = same.index(False) if False in same else NUM_GREEDY
    yield Finding(
        True,
        f"{path.name}: {told[1][1]:.1f} tokens a second one by one ({told[0][1]:.1f} on the CPU); "
        f"the first {length} of {NUM_GREEDY} greedy tokens are the CPU's",
    )


def _peers(group: Group, shards: Sequence[RankShard]) -> Peers:
    return Peers(group, tuple(shard.vocab for shard in shards), WAIT_S)


def _join(
    backend: Backend,
    rank: int,
    world_size: int,
    device: str,
    instance: str,
    tcp_port: int,
    listener: socket.socket | None,
) -> Group:
    rendezvous = Rendezvous(
        instance=instance,
        epoch=1,
        rank=rank,
        hosts=("here",) * world_size,
        address=("127.0.0.1", tcp_port),
        timeout_s=WAIT_S,
    )
    return join(rendezvous, device=device, backend=backend, listener=listener)


def main(arguments: list[str] | None = None) -> int:
    """Make all checks; print a line for each."""
    parser = argparse.ArgumentParser(prog="compute.cuda_check", description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--second", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device: str = given.device
    if given.second is not None:
        name, dtype, instance, tcp_port = cast(str, given.second).split(",")
        as_rank(1, name, dtype, device, instance, int(tcp_port))
        return 0
    index = int(device.partition(":")[2] or 0)
    if not device.startswith("cuda") or index >= torch.cuda.device_count():
        print(f"no {device} here: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
        return 2
    print(f"{torch.cuda.get_device_name(index)}, torch {torch.__version__}")
    checks: list[Callable[[str], Iterator[Finding]]]
    checks = [check_types, check_company, check_two_ranks, check_nccl]
    findings = (finding for check in checks for finding in check(device))
    models = (finding for path in given.model for finding in check_model(device, path))
    good = True
    for finding in (*findings, *models):
        print(f"{'ok  ' if finding.good else 'FAIL'} {finding.text}", flush=True)
        good = good and finding.good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
