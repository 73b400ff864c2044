"""``ctl place`` over several machines: who takes what, at which speed, and why nobody else."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from control.choose import choose
from control.cost_model import Speed
from control.fleet import Fleet
from control.json_view import to_json
from control.load_options import MeshShape
from control.placement_request import Host, Request
from control.placement_term import placement_term
from control.seats import Member
from control.topology import Kind, Link, Topology
from ops.placement_table import placement
from tests.models.specs import small

GB = 10**9
SPEC = small("llama", hidden_size=1024, intermediate_size=4096, head_dim=128, vocab_size=32000)


def fleet(*memory: float) -> Fleet:
    """Machines ``n0`` and so on that compute, and one that only stores."""
    roles = [*("compute" for _ in memory), "storage"]
    members = tuple(
        Member(
            host=Host(name=f"n{i}@h", limit_bytes=int(gb * GB), cores=2 + i),
            roles=frozenset({role}),
            has_files=i == 0,
        )
        for i, (gb, role) in enumerate(zip((*memory, 64), roles, strict=True))
    )
    topology = Topology()
    for a in members:
        for b in members:
            if a is not b:
                topology.set_link(a.host.name, b.host.name, Link(Kind.ETHERNET, 2e-4, 1.1e8))
    speeds = {("n0@h", "cpu:0"): Speed(2e10, 1e11)}
    return Fleet(members=members, topology=topology, speeds=speeds)


def shown(machines: Fleet, shape: MeshShape | None = None, goal: str = "") -> tuple[str, Any]:
    """As ``ctl place`` prints it, and its data."""
    request = Request(model="m", shape=shape, context_tokens=256, num_slots=4)
    found = choose(request, machines, SPEC, None, "F32", goal=goal)
    head = {"model": "m", "state": "remote", "size_bytes": GB, "assumed": "F32"}
    data = {**head, **to_json(placement_term(found, machines))}
    out = io.StringIO()
    Console(file=out, width=250).print(placement(data))
    return out.getvalue(), data


def test_ranks_estimates_runners_up_and_machines_that_take_none() -> None:
    text, data = shown(fleet(0.8, 0.8), goal="throughput")
    nodes = [rank["node"] for rank in data["chosen"]["ranks"]]
    assert sorted(nodes) == ["n0@h", "n1@h"]
    shares = [rank["share"] for rank in data["chosen"]["ranks"]]
    assert sum(shares) == 1
    for rank in data["chosen"]["ranks"]:
        assert rank["total_bytes"] <= rank["limit_bytes"]
    estimate = data["chosen"]["estimate"]
    parts = sum(estimate[key] for key in ("compute_s", "sums_s", "hops_s", "head_s"))
    assert abs(estimate["token_s"] - parts) < 1e-9
    for word in (
        "model m, files on n0@h",
        "for most throughput",
        "cpu:0 20 G weights/s",
        "Chosen: ",
        f"{100 * shares[0]:.3g} %",
        "Estimate: a token every",
        "tokens/s for all slots",
        "single 1x1",
        "n0@h cpu:0 has 0.80 GB, layers 0 to",
        "Machines that take no rank",
        "n2@h  has no compute role (storage)",
    ):
        assert word in text, word


def test_a_runner_up_has_its_own_figures() -> None:
    text, data = shown(fleet(8, 8))
    assert data["goal"] == "latency"
    assert data["chosen"]["strategy"] == "single"
    runner_up = next(one for one in data["rejected"] if "estimate" in one)
    assert runner_up["estimate"]["request_s"] >= data["chosen"]["estimate"]["request_s"]
    assert "a request, chosen" in text
    assert "for least latency" in text


def test_ranks_that_share_one_machine_stand_beside_what_the_plan_refused() -> None:
    text, data = shown(fleet(8, 8), MeshShape.even(2, 2))
    assert [rank["node"] for rank in data["chosen"]["ranks"]] == ["n0@h"] * 4
    assert "4 ranks were asked for, 2 devices may take one" in text


def test_one_machine_is_told_as_ever() -> None:
    text, data = shown(fleet(8))
    assert (data["node"], data["limit_bytes"], data["used_bytes"]) == ("n0@h", 8 * GB, 0)
    assert "estimate" not in data["chosen"]
    assert "n0@h lends 8.0 GB" in text
