"""A control process whose event loop is blocked by one of its servers, in its first run only.

``python blocked_node.py LOG``: LOG gets ``run PID`` for each run and ``ready PID`` once a call was
answered. The limits are short, the parts are those of ``ops/node_main.py``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.term import Term
from ops import logs
from ops.heart_client import HeartClient
from ops.loop_guard import guard_loop


class Hog(GenServer):
    """Computes for ever when it is told to, as a fault would."""

    async def handle_call(self, request: Term, from_: Term) -> Term:
        while request == b"hog":
            time.sleep(0.01)  # noqa: ASYNC251 - the fault under test
        return request


def note(log: Path, word: str) -> None:
    with log.open("a") as file:
        file.write(f"{word} {os.getpid()}\n")


async def main(log: Path, *, first: bool) -> None:
    heart = HeartClient.from_env(grace_s=0.5)
    beat = asyncio.create_task(heart.beat(every_s=0.05))
    guard = guard_loop(warn_after_s=0.3, limit_s=0.8)
    note(log, "run")
    node = Node("blocked@127.0.0.1", "cookie")
    await gen_server.start(node, Hog(), name="hog")
    heart.ready()
    await gen_server.node_call(node, "hog", b"hog" if first else b"fine", timeout_s=60)
    note(log, "ready")
    await heart.gone.wait()
    guard.stop()
    beat.cancel()
    await node.stop()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    logs.configure(
        style="console", level="info", folder=path.parent, max_file_bytes=10**6, num_files=1
    )
    asyncio.run(main(path, first="run" not in path.read_text()))
