"""One tensor rank of an MLX stage in a process of its own: ``python -m tests.compute.mlx_rank``.

Reads one JSON line: ``{"rank", "hosts", "tcp_port", "ring": [...], "shares": [...]}``; answers
with one: the base64 of its float32 logits. Rank 0 names its TCP port first.
"""

from __future__ import annotations

import base64
import json
import socket
import sys

import numpy as np

from compute.collectives import Rendezvous, join
from compute.mlx.stage import MlxStage
from compute.stage import Peers, Row
from models.mesh import grid, mesh, units_of
from tests.compute.made import made
from tests.models.specs import small

FAMILY = "qwen3"
STEPS = ((Row(0, (1, 2, 3, 4, 5), 0), Row(1, (9,), 0)), (Row(1, (7,), 1), Row(0, (8,), 5)))


def main() -> None:
    order = json.loads(sys.stdin.readline())
    rank, listener = order["rank"], None
    if rank == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        print(json.dumps({"tcp_port": listener.getsockname()[1]}), flush=True)
        tcp_port = listener.getsockname()[1]
    else:
        tcp_port = order["tcp_port"]
    checkpoint = made(small(FAMILY))
    spec = checkpoint.spec
    units = units_of(spec, checkpoint)
    shards = mesh(spec, grid(order["shares"]), units=units, split_embedding=True)
    stage = MlxStage.load(
        checkpoint,
        shards[rank],
        context_tokens=16,
        num_slots=2,
        on_progress=lambda done, total: None,
    )
    rendezvous = Rendezvous(
        instance="test-mlx-rank",
        epoch=1,
        rank=rank,
        hosts=tuple(order["hosts"]),
        address=("127.0.0.1", tcp_port),
        ring=tuple(("127.0.0.1", port) for port in order["ring"]),
        timeout_s=40.0,
    )
    group = join(rendezvous, device="mlx", listener=listener)
    peers = Peers(group, tuple(shard.vocab for shard in shards), 20.0)
    logits = np.concatenate([stage.run(rows, None, peers) for rows in STEPS])
    print(
        json.dumps(
            {"backend": group.backend, "logits": base64.b64encode(logits.tobytes()).decode()}
        ),
        flush=True,
    )
    group.barrier(timeout_s=20.0)
    group.close()
    stage.close()


if __name__ == "__main__":
    main()
