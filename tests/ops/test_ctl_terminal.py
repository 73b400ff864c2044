"""``ctl`` on a terminal: the bar of a download, a chat with editing, history and Ctrl-C."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.ops.ctl_harness import ROOT, CtlNode, running_node
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX"),
]

PROMPT = "\x1b[?2004h"  # bracketed paste is switched on for each line that is edited


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlNode]:
    with running_node(tmp_path_factory.mktemp("home")) as made:
        yield made


class Screen:
    """The terminal side of a ``ctl`` process."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.fd, self.process, self.text = fd, process, ""

    def wait_for(self, text: str, timeout_s: float = 15) -> None:
        end_s = time.monotonic() + timeout_s
        while text not in self.text:
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"no {text!r} in {self.text!r}"
            if select.select([self.fd], [], [], left_s)[0]:
                self.text += os.read(self.fd, 4096).decode("utf-8", "replace")

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self.fd, text.encode())


@contextmanager
def terminal(node: CtlNode, *args: str) -> Iterator[Screen]:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.ctl", *args, "--home", str(node.home)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Screen(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_load_shows_a_bar(node: CtlNode) -> None:
    with terminal(node, "model", "load", "tiny") as screen:
        screen.wait_for("tiny: downloading from package index")
        screen.wait_for("50.0/101.0 MB")
        screen.wait_for("tiny-1: loading")
        screen.wait_for("Instances")
        assert screen.process.wait(10) == 0


def test_a_chat_on_a_terminal(node: CtlNode) -> None:
    with terminal(node, "chat", "lama") as screen:
        screen.wait_for(PROMPT)
        screen.type("hello\r")
        screen.wait_for("heard 5 grüß [2Jdich")  # the escape itself is not passed on
        screen.wait_for(PROMPT)
        screen.type("forever\r")
        screen.wait_for("and so on")
        screen.process.send_signal(signal.SIGINT)
        screen.wait_for("(stopped)")
        wait_until(lambda: "cancelled" in node.seen, 10)
        screen.wait_for(PROMPT)
        screen.type("\x1b[A\x1b[A\r")  # two lines up in the history
        screen.wait_for("dich")
        assert node.seen[-1].startswith("asked [{")
        screen.wait_for(PROMPT)
        screen.type("\x04")
        assert screen.process.wait(10) == 0
    history = node.home / "state" / "chat_history"
    assert "+hello" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
