"""What machines tell becomes hosts, links, speeds and addresses of a placement."""

from __future__ import annotations

from typing import Any

from bridge.term import Atom
from control.cost_model import Speed
from control.device_speed import speeds_term
from control.fleet import ASSUMED, Fleet, fleet_of
from control.machine import Device, Machine
from control.meeting import Reach, reaches_term
from control.placement_request import Host
from control.topology import Kind, Link, Topology

GIB = 2**30
FAST = Speed(2e10, 4e11)
LINK = Link(Kind.ETHERNET, 2e-4, 1.1e8)


def row(
    name: str, *, state: str = "up", roles: tuple[str, ...] = ("compute",), **more: Any
) -> dict[Any, Any]:
    machine = Machine(
        total_bytes=16 * GIB,
        available_bytes=8 * GIB,
        limit_bytes=12 * GIB,
        cores=8,
        devices=(Device("cpu", "a cpu", 16 * GIB), Device("cuda", "a gpu", 4 * GIB)),
    )
    told = {Atom(key): value for key, value in more.items()}
    facts = {**machine.to_term(), Atom("roles"): [Atom(r) for r in roles], **told}
    return {Atom("name"): Atom(name), Atom("state"): Atom(state), **facts}


def test_machines_that_are_up_are_members() -> None:
    reach = Reach(host="10.0.0.2", prefix_bits=24, speed_mbps=1000)
    rows = [
        row("b@h2", speeds=speeds_term({"cpu:0": FAST}), addresses=reaches_term([reach])),
        row("a@10.0.0.1", roles=("coordinator", "storage")),
        row("c@h3", state="down"),
        row("d@h4", speeds=[{Atom("device"): b"cpu:0"}]),  # not readable
    ]
    fleet = fleet_of(rows, [])
    assert fleet.nodes == ("a@10.0.0.1", "b@h2")
    assert [one.host.name for one in fleet.computing] == ["b@h2"]
    member = fleet.member("b@h2")
    assert member is not None
    assert (member.host.limit_bytes, member.host.cores) == (12 * GIB, 8)
    assert member.host.cuda_bytes == (4 * GIB,)
    assert fleet.speeds == {("b@h2", "cpu:0"): FAST}
    assert fleet.addresses == {"a@10.0.0.1": "10.0.0.1", "b@h2": "10.0.0.2"}
    assert fleet.addresses_of(["b@h2"]) == ()
    assert fleet.addresses_of(["b@h2", "a@10.0.0.1", "b@h2"]) == (
        ("a@10.0.0.1", "10.0.0.1"),
        ("b@h2", "10.0.0.2"),
    )


def test_links_are_measured_or_taken_from_the_other_direction_or_assumed() -> None:
    measured = Topology()
    measured.set_link("a", "b", LINK)
    measured.set_link("a", "gone", LINK)
    fleet = fleet_of([row("a"), row("b"), row("c")], measured.to_term())
    assert fleet.topology.nodes == ("a", "b", "c")
    assert fleet.topology.link("a", "b") == fleet.topology.link("b", "a") == LINK
    assert fleet.topology.link("c", "a") == fleet.topology.link("a", "c") == ASSUMED
    assert fleet_of([row("a"), row("b")], [1]).topology.link("a", "b") == ASSUMED


def test_used_memory_files_and_machines_to_leave_out() -> None:
    fleet = fleet_of([row("a"), row("b")], [])
    fleet = fleet.with_used({("a", "memory"): 3 * GIB, ("a", "cuda:0"): GIB, ("x", "memory"): 1})
    fleet = fleet.with_files(["b"])
    a, b = fleet.members
    assert (a.host.used_bytes, a.host.cuda_free_bytes, a.has_files) == (3 * GIB, (3 * GIB,), False)
    assert (b.host.used_bytes, b.host.cuda_free_bytes, b.has_files) == (0, (4 * GIB,), True)
    rest = fleet.without({"a"})
    assert rest.nodes == rest.topology.nodes == ("b",)
    assert fleet.nodes == ("a", "b")
    assert fleet.with_used({}).members[0].host.used_bytes == 0


def test_one_machine_alone() -> None:
    fleet = Fleet.of_host(Host(name="a", limit_bytes=GIB))
    assert fleet.nodes == ("a",)
    assert [one.host.name for one in fleet.computing] == ["a"]
