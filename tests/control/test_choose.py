"""One door to placement: one machine as ever, several planned over."""

from __future__ import annotations

from typing import Any

import pytest

from control.choose import choose
from control.cost_model import Speed
from control.errors import NoPlacement
from control.fleet import ASSUMED, Fleet
from control.load_options import BadOption, MeshShape
from control.placement import decide
from control.placement_request import Host, Request
from control.seats import Member
from control.topology import Topology
from models.spec import ModelSpec
from tests.models.specs import small

GB = 10**9


def spec_of() -> ModelSpec:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128, "vocab_size": 32000}
    return small("llama", **sizes)


SPEC = spec_of()


def ask(shape: MeshShape | None = None, **fields: Any) -> Request:
    return Request(model="m", shape=shape, context_tokens=256, num_slots=4, **fields)


def fleet_with(*memory: float, roles: str = "compute", **fields: Any) -> Fleet:
    members = tuple(
        Member(
            host=Host(name=f"n{i}", limit_bytes=int(gb * GB), cores=4, **fields),
            roles=frozenset({roles}),
        )
        for i, gb in enumerate(memory)
    )
    topology = Topology()
    for a in members:
        for b in members:
            if a is not b:
                topology.set_link(a.host.name, b.host.name, ASSUMED)
    return Fleet(members=members, topology=topology)


@pytest.mark.parametrize("shape", [None, MeshShape.even(2, 1), MeshShape(2, 1, (2.0, 1.0))])
def test_one_machine_is_asked_as_ever(shape: MeshShape | None) -> None:
    fleet = fleet_with(64)
    found = choose(ask(shape), fleet, SPEC, None, "Q8_0")
    assert found == decide(ask(shape), (fleet.members[0].host,), SPEC, None, "Q8_0")
    assert found.plan is None


def test_machines_without_the_role_compute_do_not_make_it_several() -> None:
    alone = fleet_with(64)
    keeper = Member(host=Host(name="s", limit_bytes=GB), roles=frozenset({"storage"}))
    both = Fleet(members=(*alone.members, keeper), topology=alone.topology)
    assert choose(ask(), both, SPEC, None, "Q8_0") == choose(ask(), alone, SPEC, None, "Q8_0")


def test_of_several_machines_the_fast_one_is_taken() -> None:
    fleet = fleet_with(64, 64)
    speeds = {("n0", "cpu:0"): Speed(5e9, 5e10), ("n1", "cpu:0"): Speed(2e10, 5e11)}
    fast = Fleet(members=fleet.members, topology=fleet.topology, speeds=speeds)
    found = choose(ask(), fast, SPEC, None, "Q8_0", goal="throughput")
    assert found.chosen is not None
    assert {rank.node for rank in found.chosen.ranks} == {"n1"}
    assert found.plan is not None
    assert found.plan.goal == "throughput"
    assert found.plan.chosen is not None
    assert found.plan.chosen.candidate == found.chosen


def test_what_fits_on_no_machine_goes_over_two() -> None:
    whole = choose(ask(), fleet_with(64), SPEC, None, "F32")
    assert whole.chosen is not None
    need = whole.chosen.total_bytes
    found = choose(ask(), fleet_with(*(0.9 * need / GB,) * 2), SPEC, None, "F32")
    assert found.chosen is not None
    assert {rank.node for rank in found.chosen.ranks} == {"n0", "n1"}
    for rank in found.chosen.ranks:
        assert rank.needs.total_bytes <= rank.limit_bytes


def test_more_ranks_than_machines_go_on_the_one_with_the_files() -> None:
    fleet = fleet_with(64, 64).with_files(["n1"])
    found = choose(ask(MeshShape.even(2, 2)), fleet, SPEC, None, "Q8_0")
    assert found.chosen is not None
    assert [rank.node for rank in found.chosen.ranks] == ["n1"] * 4
    used = fleet.with_used({("n1", "memory"): 64 * GB})
    found = choose(ask(MeshShape.even(2, 2)), used, SPEC, None, "Q8_0")
    assert found.chosen is not None
    assert [rank.node for rank in found.chosen.ranks] == ["n0"] * 4


def test_where_nothing_fits_the_reason_has_numbers() -> None:
    found = choose(ask(), fleet_with(0.01, 0.01), SPEC, None, "Q8_0")
    assert found.chosen is None
    assert isinstance(found.refusal, NoPlacement)
    assert "GB" in found.refusal.why
    found = choose(ask(), fleet_with(1, roles="storage"), SPEC, None, "Q8_0")
    assert "no machine has the role compute (n0 is storage)" in str(found.refusal)
    assert "no machine is up" in str(choose(ask(), fleet_with(), SPEC, None, "Q8_0").refusal)


def test_what_a_machine_cannot_do() -> None:
    with pytest.raises(BadOption, match="lends 4 cores"):
        choose(ask(threads=9), fleet_with(64), SPEC, None, "Q8_0")
    found = choose(ask(threads=9), fleet_with(64, 64), SPEC, None, "Q8_0")
    assert "n0 lends 4 cores, threads=9" in str(found.refusal)


def test_a_device_that_others_fill_is_no_place() -> None:
    fleet = fleet_with(64, 64, cuda_bytes=(16 * GB,))
    free = choose(ask(), fleet, SPEC, None, "Q8_0").chosen
    assert free is not None
    used = {(f"n{i}", "cuda:0"): 16 * GB for i in range(2)}
    found = choose(ask(), fleet.with_used(used), SPEC, None, "Q8_0")
    assert found.chosen is None
    assert "cuda:0 has 0.00 GB" in str(found.refusal)
    alone = fleet_with(64, cuda_bytes=(16 * GB,)).with_used(used)
    assert choose(ask(), alone, SPEC, None, "Q8_0").chosen is None


def test_mlx_without_a_gpu_takes_what_it_takes_on_one_machine() -> None:
    request = ask(engine="mlx")
    several = choose(request, fleet_with(64, 64, has_mlx=True), SPEC, None, "Q8_0").chosen
    alone = choose(request, fleet_with(64, has_mlx=True), SPEC, None, "Q8_0").chosen
    assert several is not None
    assert alone is not None
    assert several.ranks[0].needs == alone.ranks[0].needs
