"""Heart on real processes: what it restarts, what it passes on, what it never leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.heart import FDS_VARIABLE, History, Limits
from ops.heart_client import HeartClient
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and groups of POSIX")

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("heart_child.py")
PROGRAM = """
import sys
from ops.heart import Limits, run
limits = Limits(silent_s=0.7, stop_s=1.0, first_pause_s=0.02, longest_pause_s=0.1)
sys.exit(run([sys.executable, *sys.argv[1:]], limits=limits))
"""


class Heart:
    """One heart process, the log of its children, and what they left on stderr."""

    def __init__(self, folder: Path, *plans: str) -> None:
        self.log = folder / "log"
        self.log.touch()
        self.errors = folder / "stderr"
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(CHILD), str(self.log), *plans],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stderr=stderr,
            )

    def lines(self, word: str) -> list[list[str]]:
        split = (line.split() for line in self.log.read_text().splitlines())
        return [words[1:] for words in split if words[0] == word]

    def wait_for(self, word: str, times: int = 1) -> list[str]:
        wait_until(lambda: len(self.lines(word)) >= times, 15, f"{times} x {word}")
        return self.lines(word)[times - 1]

    def wait_ready(self, times: int = 1) -> int:
        return int(self.wait_for("ready", times)[0])

    def status(self) -> int:
        return self.process.wait(15)

    def processes(self) -> set[int]:
        return {int(pid) for words in self.lines("start") for pid in (words[0], words[2])}


@pytest.fixture
def hearts(tmp_path: Path) -> Iterator[list[Heart]]:
    made: list[Heart] = []
    yield made
    for heart in made:
        heart.process.kill()
        heart.process.wait()
        left = heart.processes()
        wait_until(partial(all_dead, left), 5, "no orphan")


def alive(pids: set[int]) -> set[int]:
    found = set()
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            continue  # dead; whoever adopted it has not collected it yet
        found.add(pid)
    return found


def all_dead(pids: set[int]) -> bool:
    return not alive(pids)


@pytest.mark.slow
def test_a_killed_child_is_started_again_and_its_group_is_cleared(
    hearts: list[Heart], tmp_path: Path
) -> None:
    heart = Heart(tmp_path, "serve")
    hearts.append(heart)
    first = heart.wait_ready()
    pid, group, helper = map(int, heart.lines("start")[0])
    assert pid == group == first
    os.kill(first, signal.SIGKILL)
    second = heart.wait_ready(2)
    assert second != first
    wait_until(lambda: not alive({first, helper}), 5)
    assert alive({second})
    assert "was killed by signal 9; starting it again" in heart.errors.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_and_ends_heart(
    hearts: list[Heart], tmp_path: Path, number: signal.Signals
) -> None:
    heart = Heart(tmp_path, "serve")
    hearts.append(heart)
    heart.wait_ready()
    heart.process.send_signal(number)
    assert heart.status() == 0
    assert heart.lines("signal") == [[number.name]]
    assert not alive(heart.processes())


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_an_answer_is_passed_through(hearts: list[Heart], tmp_path: Path, status: int) -> None:
    heart = Heart(tmp_path, str(status))
    hearts.append(heart)
    assert heart.status() == status
    assert len(heart.lines("start")) == 1


@pytest.mark.slow
def test_status_1_after_ready_is_a_crash(hearts: list[Heart], tmp_path: Path) -> None:
    heart = Heart(tmp_path, "ready-then-1", "1", "serve")
    hearts.append(heart)
    heart.wait_ready(2)
    assert len(heart.lines("start")) == 3
    heart.process.terminate()
    assert heart.status() == 0


@pytest.mark.slow
def test_a_blocked_loop_is_dumped_killed_and_started_again(
    hearts: list[Heart], tmp_path: Path
) -> None:
    heart = Heart(tmp_path, "block", "serve")
    hearts.append(heart)
    blocked = heart.wait_ready()
    assert heart.wait_ready(2) != blocked
    said = heart.errors.read_text()
    assert "was silent for 0.7 s" in said
    assert "in serve" in said  # the culprit's frame
    assert not alive({blocked})


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["serve", "linger", "block"])
def test_a_killed_heart_leaves_nobody(hearts: list[Heart], tmp_path: Path, plan: str) -> None:
    heart = Heart(tmp_path, plan)
    hearts.append(heart)
    heart.wait_ready()
    heart.process.kill()
    child = int(heart.lines("start")[0][0])
    wait_until(lambda: not alive({child}), 5, "the child followed heart")


@pytest.mark.slow
def test_early_deaths_end_heart_with_the_status(hearts: list[Heart], tmp_path: Path) -> None:
    heart = Heart(tmp_path, "7")
    hearts.append(heart)
    assert heart.status() == 7
    assert len(heart.lines("start")) == 5
    assert "5 deaths before it was ready: giving up" in heart.errors.read_text()


@pytest.mark.slow
def test_an_early_signal_death_is_told_as_a_shell_does(hearts: list[Heart], tmp_path: Path) -> None:
    heart = Heart(tmp_path, "die")
    hearts.append(heart)
    assert heart.status() == 128 + signal.SIGKILL


@pytest.mark.slow
def test_a_child_deaf_to_the_stop_is_killed(hearts: list[Heart], tmp_path: Path) -> None:
    heart = Heart(tmp_path, "deaf")
    hearts.append(heart)
    heart.wait_ready()
    heart.process.terminate()
    assert heart.status() == 128 + signal.SIGKILL
    assert "did not stop within 1 s" in heart.errors.read_text()


def test_a_program_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    program = "from ops.heart import run; run(['/no/such/program'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "FileNotFoundError" in done.stderr


def test_without_heart_the_client_does_nothing() -> None:
    async def main() -> None:
        client = HeartClient.from_env({})
        assert not client.present
        beat = asyncio.create_task(client.beat())
        client.ready()
        client.close()
        await asyncio.sleep(0)
        assert not beat.done()
        assert not client.gone.is_set()
        beat.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("text", ["", "7", "3,4,5", "a,b"])
def test_odd_descriptors_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        HeartClient.from_env({FDS_VARIABLE: text})


@given(st.lists(st.none() | st.floats(0, 100), max_size=30))
def test_pauses_double_and_end_when_it_was_steady(runs: list[float | None]) -> None:
    limits = Limits()
    history = History(limits)
    early, last_s = 0, 0.0
    for ready_for_s in runs:
        early = early + 1 if ready_for_s is None else 0
        pause_s = history.after_death(ready_for_s=ready_for_s)
        if early == limits.max_early_deaths:
            assert pause_s is None
            return
        steady = ready_for_s is not None and ready_for_s >= limits.steady_s
        want_s = 0.1 if steady or not last_s else min(2 * last_s, limits.longest_pause_s)
        assert pause_s == want_s
        last_s = want_s
