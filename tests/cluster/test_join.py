"""Machines find each other, notice a cut link and come back: real nodes in network namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import netns
from tests.cluster.live_node import LiveNode, free_tcp_port
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

EPMD_PORT = 4369
JOIN_S = 30.0
NOTICE_S = 4.0  # CONTRACT section 7


class Machine:
    """A node in a namespace: started, asked and stopped from outside."""

    def __init__(self, place: netns.Machine, home: Path) -> None:
        self.place = place
        self.node = LiveNode(
            home, f"phalanx@{place.address}", EPMD_PORT, prefix=tuple(place.prefix)
        )

    @property
    def name(self) -> str:
        return self.node.name

    def start(self, config: Path, *args: str, cookie: str = "SECRETOFTHETEST") -> Machine:
        share_cookie(self.node.home, cookie)
        self.node.begin("--config", str(config), "--no-model", *args)
        return self

    def json(self, *args: str) -> Any:
        done = self.node.ctl(*args, "--json")
        return json.loads(done.stdout) if done.stdout else None

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in self.json("nodes") or []}


class Feed:
    """``GET /cluster/events`` of a node, read by a thread: ``(seconds, kind, data)``."""

    def __init__(self, node: LiveNode) -> None:
        self.events: list[tuple[float, str, dict[str, Any]]] = []
        url = f"{node.url}/cluster/events"
        code = "import sys,httpx\nwith httpx.stream('GET',sys.argv[1],timeout=None) as r:\n"
        code += " for line in r.iter_lines(): print(line, flush=True)"
        self._process = subprocess.Popen(
            [*node.prefix, sys.executable, "-c", code, url],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        kind = ""
        with self._process.stdout as lines:
            for line in lines:
                what, _, rest = line.strip().partition(": ")
                if what == "event":
                    kind = rest
                elif what == "data":
                    self.events.append((time.monotonic(), kind, json.loads(rest)))

    def wait_open(self) -> None:
        """Until the first event, the status, came: from then on none is missed."""
        wait_until(lambda: self.events, 15.0, "the first event")

    def wait(self, kind: str, node: str, timeout_s: float) -> float:
        """When the event of ``node`` came."""

        def found() -> list[float]:
            return [t for t, k, d in list(self.events) if k == kind and d.get("node") == node]

        return wait_until(found, timeout_s, f"{kind} of {node} in {self.events}")[0]

    def wait_leader(self, node: str, timeout_s: float) -> float:
        """When ``node`` was first heard to lead, and may place."""

        def found() -> list[float]:
            told = [(t, d) for t, k, d in list(self.events) if k == "leader" and d["authority"]]
            return [t for t, d in told if d["leader"] == node]

        return wait_until(found, timeout_s, f"{node} leads in {self.events}")[0]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._thread.join(10)


def until_states(machines: Iterable[Machine], wanted: dict[str, str]) -> None:
    for machine in machines:
        try:
            wait_until(partial(_has_states, machine, wanted), JOIN_S, f"{machine.name}: {wanted}")
        except AssertionError as exc:
            log = "\n".join(machine.node.lines)
            raise AssertionError(f"{exc}\nbut {machine.states()}\n{log}") from exc


def _has_states(machine: Machine, wanted: dict[str, str]) -> bool:
    return machine.states() == wanted


def share_cookie(home: Path, cookie: str) -> None:
    home.mkdir(mode=0o700, parents=True)
    handle = os.open(home / "cookie", os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(cookie)


def config_file(folder: Path, text: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(f"cluster_name: lab\nengine: {{spare_ports: 0}}\n{text}")
    return path


@pytest.fixture(scope="module")
def places() -> Iterator[list[netns.Machine]]:
    if why := netns.reason_for_none():
        pytest.skip(why)
    with netns.machines(4) as made:
        yield made


@pytest.fixture(scope="module")
def auto(
    places: list[netns.Machine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Machine]]:
    """Two machines that find each other by multicast, one with another cookie, one with --join."""
    folder = tmp_path_factory.mktemp("auto")
    config = config_file(folder)
    a, b, stranger, guest = [Machine(p, folder / f"home{i}") for i, p in enumerate(places)]
    static = config_file(
        folder / "static", f"network: {{discovery: static, peers: [{a.place.address}]}}\n"
    )
    made = [a, b, stranger, guest]
    try:
        a.start(config)
        b.start(config)
        stranger.start(config, cookie="ANOTHERSECRET")
        guest.start(static)
        for machine in made:
            machine.node.wait_ready(1)
        yield made
    finally:
        for machine in made:
            machine.node.stop()


def test_machines_with_one_secret_become_one_cluster(auto: list[Machine]) -> None:
    a, b, _, guest = auto
    until_states((a, b, guest), {m.name: "up" for m in (a, b, guest)})


def test_a_machine_with_another_cookie_is_seen_and_named_and_never_joined(
    auto: list[Machine],
) -> None:
    a, b, stranger, _ = auto
    assert stranger.states() == {stranger.name: "up"}
    for here, there in ((a, stranger), (stranger, b)):
        doctor = here.node.ctl("doctor")
        assert doctor.returncode == 1
        (line,) = [x for x in doctor.stdout.splitlines() if there.name in x]
        assert "another secret" in line
        assert f"[{there.place.address_v6}]" in line  # announced and heard with both families
        assert f"works at {here.place.address}" in doctor.stdout


def test_a_cut_link_is_noticed_and_the_machine_comes_back_with_it(auto: list[Machine]) -> None:
    a, b, _, guest = auto
    feeds = [Feed(a.node), Feed(guest.node)]
    try:
        for feed in feeds:
            feed.wait_open()
        cut_s = time.monotonic()
        b.place.cut()
        for feed in feeds:
            assert feed.wait("node_down", b.name, 10.0) - cut_s < NOTICE_S
        assert a.states()[b.name] == "down"
        assert b.states() == {a.name: "down", b.name: "up", guest.name: "down"}
        b.place.mend()
        for feed in feeds:
            feed.wait("node_up", b.name, JOIN_S)
        until_states((b,), {m.name: "up" for m in (a, b, guest)})
    finally:
        for feed in feeds:
            feed.stop()


def test_three_nodes_of_one_machine_join_by_its_epmd(tmp_path: Path) -> None:
    config = config_file(tmp_path, "network: {discovery: epmd}\n")
    port = free_tcp_port()
    nodes = [LiveNode(tmp_path / n, f"{n}@127.0.0.1", port) for n in ("one", "two", "three")]
    stranger = LiveNode(tmp_path / "four", "four@127.0.0.1", port)
    try:
        for node in (*nodes, stranger):
            share_cookie(node.home, "SECRET" if node is not stranger else "OTHER")
            node.begin("--config", str(config), "--no-model")
        wanted = {node.name: "up" for node in nodes}

        def states(node: LiveNode) -> dict[str, str]:
            return {row["name"]: row["state"] for row in node.status()["nodes"]}

        def all_joined() -> bool:
            return all(states(node) == wanted for node in nodes)

        for node in (*nodes, stranger):
            node.wait_ready(1)
        wait_until(all_joined, JOIN_S, f"{wanted} on each")
        assert states(stranger) == {stranger.name: "up"}
    finally:
        for node in (*nodes, stranger):
            node.stop()
