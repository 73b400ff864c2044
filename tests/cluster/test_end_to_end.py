"""The main job: a real model answers through a supervised node; official client, real kills."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import httpx
import openai
import psutil
import pytest

from tests.cluster.live_node import LiveNode
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def client_of(node: LiveNode) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(node: LiveNode, *, max_tokens: int = 24, text: str = "", model: str = MODEL) -> str:
    """One greedy answer."""
    messages = [{"role": "user", "content": text}] if text else QUESTION
    with node.inside(), client_of(node) as client:
        answer = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]  # plain dicts are fine at run time
            temperature=0,
            max_tokens=max_tokens,
        )
    return answer.choices[0].message.content or ""


class Stream(threading.Thread):
    """A streaming client in a thread: collects the pieces, tells when the first came."""

    def __init__(self, node: LiveNode, *, max_tokens: int, model: str = MODEL) -> None:
        super().__init__(daemon=True)
        self._node, self._max_tokens, self._model = node, max_tokens, model
        self.pieces: list[str] = []
        self.times_s: list[float] = []
        self.error: Exception | None = None
        self.finish: str | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._node.inside(), client_of(self._node) as client:
                for chunk in client.chat.completions.create(
                    model=self._model,
                    messages=[{"role": "user", "content": "Tell me a long story about a fox."}],
                    temperature=0,
                    max_tokens=self._max_tokens,
                    stream=True,
                ):
                    self.pieces.append(chunk.choices[0].delta.content or "")
                    self.times_s.append(time.monotonic())
                    self.finish = chunk.choices[0].finish_reason
        except Exception as exc:  # noqa: BLE001 - looked at by the test
            self.error = exc

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def result(self) -> str:
        self.join(90)
        assert not self.is_alive()
        assert self.error is None, self.error
        return self.text


def test_chat_with_the_official_client(shared_node: LiveNode) -> None:
    assert "Paris" in ask(shared_node)


def test_default_names_the_start_model(shared_node: LiveNode) -> None:
    with client_of(shared_node) as client:
        answer = client.completions.create(
            model="default", prompt="The capital of France is", max_tokens=5, temperature=0
        )
    assert "Paris" in answer.choices[0].text


def test_streaming_equals_the_whole_answer(shared_node: LiveNode) -> None:
    whole = Stream(shared_node, max_tokens=40)
    assert whole.result() == ask(
        shared_node, max_tokens=40, text="Tell me a long story about a fox."
    )
    assert whole.finish == "length"


def test_status_says_what_the_contract_says(shared_node: LiveNode) -> None:
    status = shared_node.status()
    assert status["leader"] == status["node"] == "shared@127.0.0.1"
    (node,) = status["nodes"]
    assert node["state"] == "up"
    assert node["memory"]["total_bytes"] > node["memory"]["available_bytes"] > 0
    (instance,) = status["instances"]
    assert (instance["state"], instance["model"], instance["epoch"]) == ("ready", MODEL, 1)
    (rank,) = instance["ranks"]
    assert (rank["layers"], rank["kv_heads"], rank["device"]) == ([0, 30], [0, 3], "cpu:0")
    assert rank["memory_bytes"] > 50e6
    assert psutil.pid_exists(rank["os_pid"])


def test_an_unknown_model_and_a_long_prompt_are_refused(shared_node: LiveNode) -> None:
    with client_of(shared_node) as client:
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nonesuch", prompt="Hello")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="word " * 9000)
    assert caught.value.code == "context_length_exceeded"


def test_a_client_that_leaves_is_out_within_two_seconds(shared_node: LiveNode) -> None:
    story = [{"role": "user", "content": "Tell me a long story about a fox."}]
    body = {"model": MODEL, "messages": story, "stream": True, "temperature": 0}
    with httpx.stream(
        "POST", f"{shared_node.url}/v1/chat/completions", json=body, timeout=30
    ) as response:
        lines = response.iter_lines()  # kept: httpx closes the response with its iterator
        next(lines)
        wait_until(lambda: shared_node.instance()["active_requests"] == 1, 5.0)
    wait_until(lambda: shared_node.instance()["active_requests"] == 0, 2.0)


def test_the_cookie_is_on_no_command_line_and_in_no_log(shared_node: LiveNode) -> None:
    secret = shared_node.cookie
    for pid in {shared_node.control_pid(), *shared_node.port_pids()}:
        process = psutil.Process(pid)
        assert secret not in " ".join(process.cmdline())
        assert secret not in process.environ().values()
    for path in (shared_node.home / "logs").iterdir():
        assert secret not in path.read_text(errors="replace")


def test_a_killed_rank_costs_a_stream_a_pause_and_nothing_else(
    make_node: Callable[..., LiveNode],
) -> None:
    node = make_node()
    undisturbed = Stream(node, max_tokens=80).result()
    stream = Stream(node, max_tokens=80)
    wait_until(lambda: len(stream.pieces) > 20, 30)
    victim = node.rank_pid()
    os.kill(victim, signal.SIGKILL)
    assert stream.result() == undisturbed
    pause_s = max(b - a for a, b in zip(stream.times_s, stream.times_s[1:], strict=False))
    assert pause_s < 5.0
    instance = node.instance()
    assert (instance["state"], instance["epoch"], instance["restarts"]) == ("ready", 2, 1)
    assert node.rank_pid() != victim
    assert "coordinator" in node.ctl("tree").stdout
    assert "Paris" in ask(node)


def test_a_stopped_rank_is_noticed_and_replaced(make_node: Callable[..., LiveNode]) -> None:
    node = make_node()
    undisturbed = Stream(node, max_tokens=60).result()
    stream = Stream(node, max_tokens=60)
    wait_until(lambda: len(stream.pieces) > 10, 30)
    victim = node.rank_pid()
    os.kill(victim, signal.SIGSTOP)
    assert stream.result() == undisturbed
    assert node.rank_pid() != victim
    assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == "zombie"


def test_heart_brings_a_killed_control_process_back_and_it_adopts_its_ports(
    make_node: Callable[..., LiveNode],
) -> None:
    node = make_node()
    rank, control = node.rank_pid(), node.control_pid()
    os.kill(control, signal.SIGKILL)
    node.wait_ready(2, timeout_s=30)
    assert node.control_pid() != control
    assert node.rank_pid() == rank, "the weights stayed where they were"
    assert "Paris" in ask(node)
    assert node.stop() == 0
    assert not node.port_pids()


def test_nothing_is_left_when_heart_and_control_are_both_killed(
    make_node: Callable[..., LiveNode],
) -> None:
    node = make_node()
    assert node.heart is not None
    ports = node.port_pids()
    assert ports
    for pid in (node.heart.pid, node.control_pid()):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not node.port_pids(), 10.0, "ports without a parent end themselves")


def test_the_node_stops_when_only_heart_is_killed(make_node: Callable[..., LiveNode]) -> None:
    node = make_node()
    assert node.heart is not None
    control = node.control_pid()
    os.kill(node.heart.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(control) and not node.port_pids(), 10.0)


def test_ctl_stop_leaves_nothing_behind(make_node: Callable[..., LiveNode]) -> None:
    node = make_node()
    assert node.ctl("stop").returncode == 0
    assert node.heart is not None
    assert node.heart.wait(30) == 0
    assert not node.port_pids()
    assert node.ctl("status").returncode == 3


def kill_all_ports(node: LiveNode) -> None:
    """The rank and every spare, so that nothing is ready to take over."""
    for pid in node.port_pids():
        os.kill(pid, signal.SIGKILL)


def test_streams_go_on_when_no_spare_is_left(make_node: Callable[..., LiveNode]) -> None:
    node = make_node()
    undisturbed = Stream(node, max_tokens=60).result()
    # More streams than slots: those that wait in the queue are not to blame for any death.
    streams = [Stream(node, max_tokens=60) for _ in range(7)]
    for _ in range(5):
        wait_until(lambda: any(len(s.pieces) > 3 or not s.is_alive() for s in streams), 60)
        kill_all_ports(node)
        new_ask = ask(node, max_tokens=8)
        assert "Paris" in new_ask, "a request that comes in between waits"
    assert [stream.result() for stream in streams] == [undisturbed] * 7
    assert node.instance()["restarts"] >= 5


@pytest.mark.parametrize(
    "extremes",
    [
        {"top_p": 0},
        {"temperature": 2, "top_p": 1, "top_k": 0, "min_p": 1},
        {"temperature": 5e-324},
        {"temperature": 0, "seed": 2**63 - 1},
        {"presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {"0": -100, "5": 100}},
        {"top_logprobs": 20, "logprobs": True},
        {"stop": ["\u00e9", "\n\n", " ", "x" * 500]},
    ],
)
def test_no_allowed_value_disturbs_the_rank(
    shared_node: LiveNode, extremes: dict[str, object]
) -> None:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 3, **extremes}
    answer = httpx.post(f"{shared_node.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert shared_node.instance()["epoch"] == 1
