"""A cluster for tests: machines in namespaces, each with a configuration, a place in the network.

What they would fetch from the internet comes from one more machine, which notes what it gives.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import netns
from tests.cluster.live_node import LiveNode
from tests.cluster.test_join import EPMD_PORT, share_cookie
from tests.control.file_server import FileServer
from tests.control.hub_server import add_repo
from tests.waiting import wait_until

SECRET = "SECRETOFTHELAB"
REPO, FILE = "lab/smollm2", "smollm2.gguf"
MODEL = f"hf:{REPO}/{FILE}"
JOIN_S = 40.0
READY_S = 60.0
FAST_MBIT, FAST_MS = 1000, 1
SLOW_MBIT, SLOW_MS = 100, 5

CONFIG = """\
cluster_name: lab
devices:
  - hostname: {host}
    roles: [{roles}]
    max_memory: {memory}
models:
  default: []
engine:
  context: 1024
  slots: 2
  threads: 1
  spare_ports: 0
  kernel_cache: {kernels}
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a machine's own configuration says of it."""

    memory: str = "1GB"
    roles: str = "coordinator, compute, storage"


@dataclass(slots=True)
class Box:
    """A machine of the lab and its node."""

    place: netns.Machine
    node: LiveNode
    config: Path

    @property
    def name(self) -> str:
        return self.node.name

    def begin(self) -> None:
        """Start its node, also once more; wait for nothing."""
        self.node.lines.clear()
        self.node.begin("--config", str(self.config))

    def kill(self) -> None:
        """Power cut."""
        self.place.kill()
        assert self.node.heart is not None
        self.node.heart.wait(10)

    def post(self, what: str, **body: Any) -> Any:
        """The answer of ``POST /cluster/...``, which must be yes."""
        answer = self.ask(what, **body)
        assert answer.is_success, answer.text
        return answer.json()

    def ask(self, what: str, **body: Any) -> httpx.Response:
        """The same, whatever the answer."""
        with self.node.inside():
            return httpx.post(f"{self.node.url}/cluster/{what}", json=body, timeout=90)

    def instances(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.node.get("instances")}

    def ready(self, id_: str) -> dict[str, Any]:
        """The instance, once it is ready."""

        def found() -> dict[str, Any]:
            row = self.instances().get(id_, {"state": "unknown"})
            assert row["state"] != "failed", row
            return row if row["state"] == "ready" else {}

        return wait_until(found, READY_S, f"{id_} ready")

    def load(self, model: str = MODEL, **options: Any) -> dict[str, Any]:
        """Load a model; its instance once it is ready."""
        return self.ready(self.post("load", model=model, **options)["id"])

    def up(self) -> set[str]:
        """Machines that it sees."""
        return {row["name"] for row in self.node.get("nodes") if row["state"] == "up"}


@dataclass(slots=True)
class Lab:
    """All machines; ``outside`` is the rest of the world."""

    boxes: list[Box]
    outside: FileServer

    def fetched(self) -> list[str]:
        """Model files that were given out, a name each time."""
        paths = [path for method, path, _ in self.outside.requests if method == "GET"]
        return [path.rpartition("/")[2] for path in paths if "/resolve/" in path]

    def box(self, name: str) -> Box:
        return next(box for box in self.boxes if box.name == name)

    def others(self, *boxes: Box) -> list[Box]:
        return [box for box in self.boxes if box not in boxes]

    def wait_joined(self) -> str:
        """Until every machine sees every other and one leader; who that is."""
        names = {box.name for box in self.boxes}

        def joined() -> str:
            leaders = {str(box.node.status()["leader"]) for box in self.boxes}
            alike = len(leaders) == 1 and all(box.up() == names for box in self.boxes)
            return leaders.pop() if alike and leaders <= names else ""

        return wait_until(joined, JOIN_S, "one cluster with one leader")


@contextlib.contextmanager
def lab(
    folder: Path, model: Path, kernels: Path, setups: Sequence[Setup], *, stocked: bool = False
) -> Iterator[Lab]:
    """As many machines as there are ``setups``, started and joined; the last has a slow link.

    Args:
        model: file of the default model; it can be fetched as ``MODEL``.
        kernels: cache of compiled code that is kept for further tests.
        stocked: every machine has the default model's files already.
    """
    with netns.machines(len(setups) + 1) as places:
        *inner, internet = places
        for place in inner[:-1]:
            place.shape(rate_mbit=FAST_MBIT, delay_ms=FAST_MS)
        inner[-1].shape(rate_mbit=SLOW_MBIT, delay_ms=SLOW_MS)
        with internet.inside():
            outside = FileServer(internet.address)
        add_repo(outside, REPO, {FILE: model.read_bytes()})
        boxes = [
            _box(place, folder / f"machine{i}", setup, kernels, outside.url)
            for i, (place, setup) in enumerate(zip(inner, setups, strict=True), 1)
        ]
        made = Lab(boxes, outside)
        for box in boxes if stocked else ():
            _stock(box.node.home / "models" / model.parent.name, model.parent)
        try:
            for box in boxes:
                box.begin()
            for box in boxes:
                box.node.wait_ready(1)
            made.wait_joined()
            yield made
        finally:
            for box in boxes:
                box.node.stop()
            outside.close()


def _stock(folder: Path, stored: Path) -> None:
    """Put files of another store there, without a copy where that can be."""
    folder.mkdir(mode=0o700, parents=True)
    for file in stored.iterdir():
        try:
            (folder / file.name).hardlink_to(file)
        except OSError:  # on another disk
            shutil.copy2(file, folder / file.name)


def _box(place: netns.Machine, folder: Path, setup: Setup, kernels: Path, hub: str) -> Box:
    share_cookie(folder / "home", SECRET)
    config = folder / "config.yaml"
    config.write_text(
        CONFIG.format(
            host=socket.gethostname(),
            roles=setup.roles,
            memory=setup.memory,
            kernels=kernels,
        )
    )
    # Straight there, whatever proxy this process was given.
    environ = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}
    node = LiveNode(
        folder / "home",
        f"phalanx@{place.address}",
        EPMD_PORT,
        prefix=tuple(place.prefix),
        inside=place.inside,
        environ=environ,
    )
    return Box(place, node, config)
