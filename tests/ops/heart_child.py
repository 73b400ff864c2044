"""A control process for the heart tests: beats, logs what happens to it, does what it is told.

``python heart_child.py LOG PLAN...``: run N follows the N-th plan (the last one for all later
runs). LOG gets one line per event; its ``start`` lines count the runs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ops.heart_client import HeartClient


def note(log: Path, *words: object) -> None:
    with log.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


async def serve(log: Path, heart: HeartClient, plan: str) -> int:
    stop = asyncio.Event()

    def asked(number: signal.Signals) -> None:
        note(log, "signal", number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, asked, number)
    beat = asyncio.create_task(heart.beat(every_s=0.05))
    heart.ready()
    note(log, "ready", os.getpid())
    if plan == "block":
        time.sleep(3600)  # noqa: ASYNC251 - the fault under test
    if plan == "ready-then-1":
        beat.cancel()
        return 1
    gone = asyncio.create_task(heart.gone.wait())
    if plan == "deaf":
        await asyncio.sleep(3600)
    await asyncio.wait({gone, asyncio.create_task(stop.wait())}, return_when="FIRST_COMPLETED")
    note(log, "gone" if heart.gone.is_set() else "stopped", os.getpid())
    if plan == "linger":
        await asyncio.sleep(3600)
    heart.close()
    return 0


async def main(log: Path, plan: str) -> int:
    heart = HeartClient.from_env(grace_s=0.5)
    if plan.isdigit():
        return int(plan)
    if plan == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return await serve(log, heart, plan)


if __name__ == "__main__":
    log, *plans = Path(sys.argv[1]), *sys.argv[2:]
    run = sum(line.startswith("start") for line in log.read_text().splitlines())
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    note(log, "start", os.getpid(), os.getpgrp(), helper.pid)
    status = asyncio.run(main(log, plans[min(run, len(plans) - 1)]))
    if status == 0:
        helper.kill()  # after any other end heart clears the group
    sys.stdout.flush()
    os._exit(status)
