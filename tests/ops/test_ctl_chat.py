"""``ctl chat``: streaming, conversations, cancelling, and a node that dies in an answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.ctl_harness import ROOT, CtlNode, running_node
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlNode]:
    with running_node(tmp_path_factory.mktemp("home")) as made:
        yield made


def test_one_answer_is_printed_whole(node: CtlNode) -> None:
    found = node.ctl("chat", "lama", "-p", "hi", "--temperature", "0", "--seed", "7")
    assert (found.status, found.err) == (0, "")
    assert found.out == "heard 2 grüß \x1b[2Jdich\n"  # a pipe gets every byte
    assert node.seen[-1] == "asked b'hi' 3"


def test_a_system_prompt_makes_it_messages(node: CtlNode) -> None:
    assert node.ctl("chat", "lama", "-p", "hi", "--system", "be brief").status == 0
    asked = "[{'role': 'system', 'content': b'be brief'}, {'role': 'user', 'content': b'hi'}]"
    assert node.seen[-1].replace("Atom(", "").replace("')", "'") == f"asked {asked} 1"


def test_a_chat_remembers_until_told_to_forget(node: CtlNode) -> None:
    before = len(node.seen)
    lines = "one\n\ntwo\n/what\n/clear\nthree\n/exit\nnever\n"
    found = node.ctl("chat", "lama", stdin=lines)
    assert found.status == 0
    asked = node.seen[before:]
    assert len(asked) == 3
    assert asked[1].count("content") == 3
    assert "assistant" in asked[1]
    assert asked[2].startswith("asked b'three'")
    assert "/clear forgets" in found.err


def test_a_failed_answer_does_not_end_the_chat(node: CtlNode) -> None:
    found = node.ctl("chat", "lama", stdin="fail\nhello\n")
    assert found.status == 0
    assert "error: the rank is lost" in found.err
    assert node.seen[-1].startswith("asked b'hello'")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to one process")
@pytest.mark.parametrize("one_answer", [True, False])
def test_ctrl_c_cancels_the_generation(node: CtlNode, one_answer: bool) -> None:
    before = len(node.seen)
    prompt = ["-p", "forever"] if one_answer else []
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.ctl", "chat", "lama", *prompt, "--home", str(node.home)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run in the background of a shell ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        if not one_answer:
            process.stdin.write(b"forever\n")
            process.stdin.flush()
        assert os.read(process.stdout.fileno(), 100) == b"and so on"
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "cancelled" in node.seen[before:], 10)
        out, err = process.communicate(timeout=10)  # the end of stdin ends the chat
        assert process.returncode == (130 if one_answer else 0)
        assert out == (b"" if one_answer else b"\n")
        assert b"Traceback" not in err
    finally:
        process.kill()
        process.communicate()


def test_a_node_that_dies_in_an_answer_is_status_3(tmp_path: Path) -> None:
    with running_node(tmp_path) as doomed:
        found = doomed.ctl("chat", "lama", "-p", "crash")
    assert (found.status, found.out) == (3, "half")
    assert "lost node n@127.0.0.1 in the middle of the answer" in found.err
