"""A control process with a blocked loop names the culprit, ends, and heart starts it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
# Heart's own limit is out of reach here: it is the process that gives up.
HEART = """
import sys
from ops.heart import Limits, run
sys.exit(run([sys.executable, *sys.argv[1:]], limits=Limits(silent_s=60, stop_s=5)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_blocked_loop_is_named_and_restarted(tmp_path: Path) -> None:
    log, errors = tmp_path / "log", tmp_path / "stderr"
    log.touch()
    with errors.open("wb") as stderr:
        heart = subprocess.Popen(
            [sys.executable, "-c", HEART, "-m", "tests.ops.blocked_node", str(log)],
            cwd=ROOT,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "ready" in log.read_text(), 30)
        runs = [line.split()[1] for line in log.read_text().splitlines() if line[:3] == "run"]
        assert len(set(runs)) == 2
        text = errors.read_text()
        assert "the event loop is blocked for" in text
        assert "tests/ops/blocked_node.py" in text
        assert "time.sleep(0.01)" in text  # the very line
        assert "hog" in text  # and the process by its name
        assert "giving up" in text
        assert "70" in text  # what heart says of its end
    finally:
        heart.send_signal(signal.SIGTERM)
        try:
            heart.wait(20)
        finally:
            if heart.poll() is None:
                os.killpg(heart.pid, signal.SIGKILL)
                heart.wait()
