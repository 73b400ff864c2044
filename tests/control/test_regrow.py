"""Whether what runs would do better elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from control.cost_model import Speed
from control.fleet import ASSUMED, Fleet
from control.instance_spec import InstanceSpec
from control.load_options import MeshShape
from control.placement_request import Host, Request
from control.regrow import better
from control.seats import Member
from control.topology import Topology
from models.checkpoint import Checkpoint, open_checkpoint
from tests.control.specs import spec
from tests.models.tiny import llama_tensors, write_gguf

SLOW, FAST = Speed(1e9, 1e10), Speed(1e10, 1e11)
ALL = frozenset({"compute"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_gguf(tmp_path / "tiny.gguf", llama_tensors()))


def fleet(**speeds: Speed | None) -> Fleet:
    members = tuple(
        Member(host=Host(name=name, limit_bytes=10**9, cores=2), roles=ALL, has_files=True)
        for name in speeds
    )
    topology = Topology()
    for a in speeds:
        for b in speeds:
            if a != b:
                topology.set_link(a, b, ASSUMED)
    known = {(name, "cpu:0"): speed for name, speed in speeds.items() if speed is not None}
    return Fleet(members=members, topology=topology, speeds=known)


def runs_on(*nodes: str) -> InstanceSpec:
    return replace(spec("m-1", *nodes), context_tokens=128)


def ask() -> Request:
    return Request(model="m", shape=None, context_tokens=128, num_slots=1)


def test_a_machine_that_is_ten_times_as_fast_is_worth_a_move(checkpoint: Checkpoint) -> None:
    text = better(runs_on("a"), ask(), fleet(a=SLOW, b=FAST), checkpoint, "")
    assert "1x1 on b is" in text
    assert "times as fast" in text


@pytest.mark.parametrize(
    "machines",
    [
        fleet(a=SLOW),
        fleet(a=SLOW, b=SLOW),
        fleet(a=SLOW, b=Speed(1.1e9, 1.1e10)),
        fleet(a=FAST, b=SLOW),
        fleet(a=SLOW, b=None),  # nobody has measured it
        fleet(a=None, b=FAST),
    ],
)
def test_nothing_moves_for_little_or_for_an_assumption(
    checkpoint: Checkpoint, machines: Fleet
) -> None:
    assert better(runs_on("a"), ask(), machines, checkpoint, "") == ""


def test_two_machines_give_way_to_one_that_needs_no_network(checkpoint: Checkpoint) -> None:
    spread = replace(runs_on("a", "b"), shape=MeshShape.even(2, 1))
    assert "on c is" in better(spread, ask(), fleet(a=SLOW, b=SLOW, c=FAST), checkpoint, "")
