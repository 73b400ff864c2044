"""Devices are measured once, while nothing is disturbed; every node is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.term import Atom, Pid, Term
from control.cost_model import Speed
from control.device_speed import SpeedFile, checked, devices_of, kernels_version, speeds_from
from control.machine import Device, Machine
from control.speed_meter import LEASE_NAME, Pace, SpeedMeter
from tests.control.cluster_node import MACHINE, ClusterNode, cluster_node, connect
from tests.waiting import wait_until_async

SPEED = Speed(2e10, 1e11)
QUICK = Pace(check_s=0.01, settle_s=0.0, again_s=0.01)


@dataclass
class Port(GenServer):
    """Answers ``measure`` as it is told to."""

    answer: Term
    asked: list[Term] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        self.asked.append(request)
        return self.answer


class Ports(GenServer):
    """One port for whoever leases it."""

    def __init__(self, port: Port, running: list[Term]) -> None:
        super().__init__()
        self.port, self.running, self.seen = port, running, list[Term]()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "ports":
                return [{Atom("instance"): name} for name in self.running]
            case ("lease", _, _):
                self.seen.append(request)
                pid = await gen_server.start(self.me.node, self.port)
                assert isinstance(pid, Pid)
                return (Atom("ok"), "p1", pid, 1)
            case _:
                self.seen.append(request)
                return Atom("ok")


async def meter(
    node: ClusterNode,
    path: Path,
    port: Port,
    *,
    running: list[Term] | None = None,
    used: Callable[[], float] = lambda: 1.0,
    machine: Machine = MACHINE,
) -> tuple[SpeedMeter, Ports]:
    ports = Ports(port, running if running is not None else [])
    await gen_server.start(node.node, ports, name="ports")
    made = SpeedMeter(path, lambda: machine, used_percent=used, pace=QUICK)
    await gen_server.start(node.node, made, name="speed_meter")
    return made, ports


async def speeds(asked: ClusterNode, name: str) -> dict[str, Speed]:
    return speeds_from((await asked.rows())[name]["speeds"])


def test_measured_once_kept_and_told_to_others(tmp_path: Path) -> None:
    port = Port((Atom("ok"), SPEED.weights_per_s, SPEED.flops_per_s))

    async def run() -> None:
        async with cluster_node("here") as here, cluster_node("there") as there:
            await connect(here, there)
            _, ports = await meter(here, tmp_path / "speeds.json", port)

            async def told() -> bool:
                rows = await there.rows()
                found = rows.get(here.name, {}).get("speeds", [])
                return speeds_from(found) == {"cpu:0": SPEED}

            async with asyncio.timeout(10):
                while not await told():
                    pass
            assert ports.seen == [("lease", LEASE_NAME, 0), ("release", "p1")]
            assert port.asked == [("measure", "cpu:0", MACHINE.cores)]
        async with cluster_node("again") as again:
            other = Port((Atom("error"), Atom("not_measured"), "must not be asked"))
            _, ports = await meter(again, tmp_path / "speeds.json", other)
            async with asyncio.timeout(10):
                while await speeds(again, again.name) != {"cpu:0": SPEED}:
                    pass
            assert ports.seen == []

    asyncio.run(run())


def test_what_was_measured_beside_other_work_is_measured_again(tmp_path: Path) -> None:
    answers: list[Term] = [
        (Atom("ok"), 1e10, 9e10),
        (Atom("ok"), 8e9, 2e11),
        (Atom("ok"), 1.0, 1.0),
    ]
    used = [100.0, 90.0, 1.0]

    class Moody(Port):
        async def handle_call(self, request: Term, from_: Term) -> Term:
            return answers.pop(0)

    async def run() -> None:
        async with cluster_node("here") as here:
            path = tmp_path / "speeds.json"
            await meter(here, path, Moody(Atom("ok")), used=lambda: used[-len(answers)])
            await wait_until_async(lambda: path.exists(), 10.0)
            assert await speeds(here, here.name) == {"cpu:0": Speed(1e10, 2e11)}

    asyncio.run(run())


def test_ranks_that_work_are_not_disturbed(tmp_path: Path) -> None:
    used, running = [100.0], list[Term](["m-1"])
    port = Port((Atom("ok"), SPEED.weights_per_s, SPEED.flops_per_s))
    looks = [0]

    def used_percent() -> float:
        looks[0] += 1
        return used[0]

    async def run() -> None:
        async with cluster_node("here") as here:
            path = tmp_path / "speeds.json"
            _, ports = await meter(here, path, port, running=running, used=used_percent)
            await wait_until_async(lambda: looks[0] > 5, 10.0)
            assert ports.seen == []
            used[0] = 3.0  # they wait for requests
            await wait_until_async(lambda: path.exists(), 10.0)

    asyncio.run(run())


def test_what_cannot_be_measured_is_assumed_and_the_others_are_measured(tmp_path: Path) -> None:
    gpus = tuple(Device("cuda", "a gpu", 2**34) for _ in range(2))
    machine = replace(MACHINE, devices=(*MACHINE.devices, *gpus))
    answers: list[Term] = [
        (Atom("error"), Atom("not_measured"), "no compiler"),
        (Atom("ok"), SPEED.weights_per_s, SPEED.flops_per_s),
    ]

    class Moody(Port):
        async def handle_call(self, request: Term, from_: Term) -> Term:
            return answers.pop(0)

    async def run() -> None:
        async with cluster_node("here") as here:
            path = tmp_path / "speeds.json"
            made, ports = await meter(here, path, Moody(Atom("ok")), machine=machine)
            both = {"cuda:0": SPEED, "cuda:1": SPEED}  # the second is like the first
            async with asyncio.timeout(10):
                while await speeds(here, here.name) != both:
                    pass
            state: Any = made.format_state()
            assert state["failed"] == [("cpu:0", "no compiler")]
            assert len(ports.seen) == 4

    asyncio.run(run())


def test_devices_that_ranks_may_get() -> None:
    assert devices_of(MACHINE) == {"cpu:0": "a cpu, 4 cores"}
    mac = replace(MACHINE, devices=(*MACHINE.devices, Device("metal", "M9", 2**34)))
    assert devices_of(mac) == {"cpu:0": "a cpu, 4 cores"}
    assert devices_of(replace(mac, has_mlx=True))["mlx:0"] == "M9 GPU"


@pytest.mark.parametrize("figures", [(0, 1), (1, -1), (float("nan"), 1), (1, float("inf"))])
def test_no_device_has_such_a_speed(figures: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="a device of"):
        checked(*figures)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": "v", "speeds": {"a": [1]}}'])
def test_a_damaged_file_means_measuring_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "speeds.json"
    path.write_text(text)
    file = SpeedFile(path)
    assert file.read("v") == {}
    file.write("v", {"a cpu": SPEED})
    assert file.read("v") == {"a cpu": SPEED}
    assert file.read("w") == {}  # other kernels


def test_the_version_of_the_kernels_is_that_of_their_sources() -> None:
    assert kernels_version() == kernels_version()
    assert len(kernels_version()) == 16
