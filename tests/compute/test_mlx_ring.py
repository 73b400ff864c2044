"""Two MLX ranks as real processes, whose sums go round MLX's own ring."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
from typing import IO, Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")
from compute.mlx.stage import MlxStage
from models.mesh import whole
from tests.compute.collective_ranks import ROOT, free_ports
from tests.compute.made import made
from tests.compute.mlx_rank import FAMILY, STEPS
from tests.models.specs import small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="mlx is not there"),
]
ANSWER_S = 60.0


def answer(stream: IO[bytes]) -> dict[str, Any]:
    ready, _, _ = select.select([stream], [], [], ANSWER_S)
    assert ready, f"no answer in {ANSWER_S} s"
    line = stream.readline()
    assert line, "the process has ended"
    said: dict[str, Any] = json.loads(line)
    return said


def test_two_processes_over_a_ring_give_the_logits_of_one() -> None:
    hosts, shares, ring = ["a", "b"], [2, 1], free_ports(2)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.compute.mlx_rank"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in hosts
    ]
    try:
        tcp_port = 0
        answers = []
        for rank, process in enumerate(processes):
            assert process.stdin is not None
            assert process.stdout is not None
            order = {"rank": rank, "hosts": hosts, "ring": ring, "shares": shares}
            process.stdin.write(json.dumps({**order, "tcp_port": tcp_port}).encode() + b"\n")
            process.stdin.flush()
            if rank == 0:
                tcp_port = answer(process.stdout)["tcp_port"]
        for process in processes:
            assert process.stdout is not None
            answers.append(answer(process.stdout))
            assert process.wait(timeout=20) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
    checkpoint = made(small(FAMILY))
    alone = MlxStage.load(
        checkpoint,
        whole(checkpoint.spec),
        context_tokens=16,
        num_slots=2,
        on_progress=lambda done, total: None,
    )
    expected = np.concatenate([alone.run(rows, None, None) for rows in STEPS])
    for said in answers:
        assert said["backend"] == "mlx"
        found = np.frombuffer(base64.b64decode(said["logits"]), dtype=np.float32)
        found = found.reshape(expected.shape)
        assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
