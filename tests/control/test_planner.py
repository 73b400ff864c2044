"""Planning over many machines: limits hold, layers are covered, nothing better is overlooked."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control.appraise import Appraiser
from control.cost_model import Goal, Network, Policy, Seat, Speed, Stages
from control.errors import NoPlacement
from control.load_options import MeshShape
from control.placement_request import Host, Request
from control.planner import Member, Option, Plan, plan
from control.rank_bytes import Cuts
from control.seats import Speeds, seats_of
from control.stage_split import least_peak, least_sum, within
from control.topology import Kind, Link, Topology
from models.footprint import footprint
from models.legal import IllegalShares
from models.mesh import mesh
from models.shares import partition
from models.spec import ModelSpec
from models.stored import Assumed
from tests.models.specs import FAMILIES, small

GB = 10**9
LAN = Link(Kind.ETHERNET, 2e-4, 1.18e8)
WIFI = Link(Kind.WIFI, 4e-3, 5e6)
BOLT = Link(Kind.THUNDERBOLT, 5e-5, 3e9)
SLOW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def medium(family: str = "llama", **fields: Any) -> ModelSpec:
    """Large enough that its weights matter beside a process: half a GB to some."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128, "vocab_size": 32000}
    return small(family, **{**sizes, **fields})


def ask(shape: MeshShape | None = None, **fields: Any) -> Request:
    return Request(model="m", shape=shape, context_tokens=256, num_slots=4, **fields)


def linked(names: list[str], link: Link = LAN) -> Topology:
    topology = Topology()
    for a, b in itertools.permutations(names, 2):
        topology.set_link(a, b, link)
    return topology


def machines(*memory: float, **fields: Any) -> list[Member]:
    return [
        Member(host=Host(name=f"n{i}", limit_bytes=int(gb * GB), cores=4, **fields))
        for i, gb in enumerate(memory)
    ]


def names(members: list[Member]) -> list[str]:
    return [member.host.name for member in members]


def options(found: Plan) -> list[Option]:
    return [*([found.chosen] if found.chosen else []), *found.others]


@st.composite
def clusters(draw: st.DrawFn, most: int = 6) -> tuple[list[Member], Topology, Speeds]:
    """Machines of any kind, some without compute, some links missing."""
    dice = draw(st.randoms(use_true_random=False))
    members, speeds, topology = [], {}, Topology()
    for number in range(draw(st.integers(1, most))):
        cuda = draw(st.sampled_from([(), (), (), (GB // 2,), (GB, GB // 2), (GB,) * 4]))
        host = Host(
            name=f"n{number}",
            limit_bytes=int(draw(st.sampled_from([0.1, 0.25, 0.3, 0.4, 0.7, 2.0])) * GB),
            used_bytes=draw(st.sampled_from([0, 0, 10**8])),
            cores=draw(st.sampled_from([1, 4, 16])),
            cuda_bytes=cuda,
        )
        roles = draw(st.sampled_from([{"compute"}, {"compute", "storage"}, {"storage"}]))
        members.append(Member(host=host, roles=frozenset(roles), has_files=draw(st.booleans())))
        for device in ["cpu:0", *(f"cuda:{i}" for i in range(len(cuda)))]:
            if draw(st.integers(0, 5)):
                speeds[host.name, device] = Speed(dice.uniform(1e9, 1e11), dice.uniform(1e10, 1e13))
        topology.add_node(host.name)
    for a, b in itertools.permutations(names(members), 2):
        if draw(st.integers(0, 7)):
            topology.set_link(a, b, draw(st.sampled_from([LAN, LAN, WIFI, BOLT])))
    return members, topology, speeds


families = st.sampled_from(sorted(FAMILIES))
goals = st.sampled_from(list(Goal))
policies = st.sampled_from([Policy(), Policy(in_flight=4), Policy(requests=1)])


@pytest.mark.slow
@SLOW
@given(cluster=clusters(), family=families, goal=goals, policy=policies)
def test_a_plan_exceeds_no_limit_and_covers_every_layer_once(
    cluster: tuple[list[Member], Topology, Speeds], family: str, goal: Goal, policy: Policy
) -> None:
    members, topology, speeds = cluster
    spec = medium(family)
    found = plan(
        ask(), members, topology, spec, None, speeds, kind="BF16", goal=goal, policy=policy
    )
    assert (found.chosen is None) == (found.refusal is not None)
    by_name = {member.host.name: member for member in members}
    for option in options(found):
        assert (option.candidate.why == "") == (option is found.chosen)
        ranks = option.candidate.ranks
        if not ranks:
            continue
        taken: dict[tuple[str, str], int] = {}
        for rank in ranks:
            member = by_name[rank.node]
            assert "compute" in member.roles
            exact = footprint(
                spec,
                Assumed("BF16"),
                rank.shard,
                kernels=rank.kernels,
                device=rank.device,
                context_tokens=256,
                num_slots=4,
                threads=rank.threads,
                network=len({other.node for other in ranks}) > 1,
            )
            assert rank.needs == exact
            taken[rank.node, rank.pool] = taken.get((rank.node, rank.pool), 0) + exact.total_bytes
        assert len({(rank.node, rank.device) for rank in ranks}) == len(ranks)
        for (node, pool), size in taken.items():
            host = by_name[node].host
            if pool == "memory":
                assert size <= host.limit_bytes - host.used_bytes
            else:
                assert size <= host.cuda_bytes[int(pool[5:])]
        covers(option, spec)
        talk(option, topology)


def covers(option: Option, spec: ModelSpec) -> None:
    """Ranks get what the compute plane will work out from the shares, and together all."""
    shape, ranks = option.candidate.shape, option.candidate.ranks
    assert [rank.shard for rank in ranks] == list(mesh(spec, shape.grid, split_embedding=True))
    stages = [ranks[i : i + shape.tensor] for i in range(0, len(ranks), shape.tensor)]
    layers = [layer for stage in stages for layer in stage[0].shard.layers]
    assert layers == list(range(spec.num_layers))
    for stage in stages:
        assert len({rank.shard.layers for rank in stage}) == 1
        assert {rank.device[:3] for rank in stage} in ({"cpu"}, {"cud"})
        heads = [head for rank in stage for head in rank.shard.query_heads]
        assert heads == list(range(spec.num_heads))
        rows = [row for rank in stage for row in rank.shard.vocab]
        assert rows == list(range(spec.vocab_size))


def talk(option: Option, topology: Topology) -> None:
    """All that will send to each other are linked both ways."""
    shape, nodes = option.candidate.shape, [rank.node for rank in option.candidate.ranks]
    head = (shape.pipeline - 1) * shape.tensor
    pairs = {(nodes[head], node) for node in nodes}
    for i in range(0, len(nodes), shape.tensor):
        pairs |= set(itertools.combinations(nodes[i : i + shape.tensor], 2))
    pairs |= {(nodes[i], nodes[i + shape.tensor]) for i in range(len(nodes) - shape.tensor)}
    for a, b in pairs:
        assert a == b or (topology.link(a, b) and topology.link(b, a))


@pytest.mark.slow
@SLOW
@given(cluster=clusters(), goal=goals, seed=st.integers(0, 99))
def test_a_plan_does_not_depend_on_the_order_of_anything(
    cluster: tuple[list[Member], Topology, Speeds], goal: Goal, seed: int
) -> None:
    members, topology, speeds = cluster
    dice = random.Random(seed)
    links = list(topology.links())
    dice.shuffle(links)
    other = Topology()
    for source, target, link in links:
        other.set_link(source, target, link)
    for member in dice.sample(members, len(members)):
        other.add_node(member.host.name)
    pairs = dice.sample(sorted(speeds.items()), len(speeds))
    first = plan(ask(), members, topology, medium(), None, speeds, kind="BF16", goal=goal)
    shuffled = dice.sample(members, len(members))
    again = plan(ask(), shuffled, other, medium(), None, dict(pairs), kind="BF16", goal=goal)
    assert repr(first) == repr(again)  # errors are equal to themselves alone


@pytest.mark.slow
@SLOW
@given(cluster=clusters(), family=families, goal=goals, policy=policies)
def test_a_plan_is_never_worse_than_the_plain_strategy(
    cluster: tuple[list[Member], Topology, Speeds], family: str, goal: Goal, policy: Policy
) -> None:
    members, topology, speeds = cluster
    given_ = (ask(), members, topology, medium(family), None, speeds)
    best = plan(*given_, kind="BF16", goal=goal, policy=policy)
    plain = plan(*given_, kind="BF16", goal=goal, policy=policy, strategy="greedy")
    if plain.chosen is not None and plain.chosen.estimate is not None:
        assert best.chosen is not None
        assert best.chosen.estimate is not None
        assert best.chosen.estimate.cost_s <= plain.chosen.estimate.cost_s


def everything(
    on: Appraiser, seats: list[Seat]
) -> Iterator[tuple[Stages, list[tuple[float, ...]], tuple[range, ...]]]:
    """Every arrangement and cut of the layers; tensor shares in tenths, in fifths if mixed."""
    count = on.cuts.spec.num_layers
    for size in range(1, len(seats) + 1):
        for chosen in itertools.permutations(seats, size):
            for tensor in [t for t in range(1, size + 1) if size % t == 0]:
                stages = tuple(chosen[i : i + tensor] for i in range(0, size, tensor))
                units = 10 if size == tensor else 5
                parts = [
                    tuple(map(float, shares))
                    for shares in itertools.product(range(1, units), repeat=tensor)
                    if sum(shares) == units
                ] or [(1.0,)]
                for edges in itertools.combinations(range(1, count), len(stages) - 1):
                    stops = (0, *edges, count)
                    layers = tuple(range(a, b) for a, b in itertools.pairwise(stops))
                    for shares in itertools.product(parts, repeat=len(stages)):
                        yield stages, list(shares), layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "seed"), [*((3, seed) for seed in range(8)), *((4, seed) for seed in range(2))]
)
@pytest.mark.parametrize("goal", list(Goal))
def test_a_small_cluster_gets_what_an_exhaustive_search_finds(
    count: int, seed: int, goal: Goal
) -> None:
    """Within 6 %: the search tries tensor shares in tenths, the planner by speed and memory."""
    dice = random.Random(seed)
    members, speeds, topology = [], {}, Topology()
    for member in machines(*(dice.choice([0.3, 0.4, 0.7, 2.0]) for _ in range(count))):
        members.append(replace(member, has_files=dice.random() < 0.5))
        rate = dice.uniform(1e9, 1e10)
        speeds[member.host.name, "cpu:0"] = Speed(rate, 20 * rate)
    slow = dice.choice([LAN, BOLT])
    for a, b in itertools.combinations(names(members), 2):
        link = dice.choice([slow, BOLT, Link(Kind.NVLINK, 5e-6, 1e11)])
        topology.set_link(a, b, link)
        topology.set_link(b, a, link)
    spec, policy = medium(), Policy(in_flight=1 + 3 * (seed % 2))
    found = plan(
        ask(), members, topology, spec, None, speeds, kind="BF16", goal=goal, policy=policy
    )
    on = appraiser(members, topology, spec, goal, policy)
    seats = seats_of(ask(), members, spec, speeds)[0]["torch"]
    best = min(
        on.work_out(stages, shares=shares, layers=layers).cost_s
        for stages, shares, layers in everything(on, seats)
    )
    if found.chosen is None:
        assert best == math.inf
    else:
        assert found.chosen.estimate is not None
        assert found.chosen.estimate.cost_s <= 1.06 * best


def appraiser(
    members: list[Member], topology: Topology, spec: ModelSpec, goal: Goal, policy: Policy
) -> Appraiser:
    cuts = Cuts(
        spec, Assumed("BF16"), assumed=True, experts="inside", context_tokens=256, num_slots=4
    )
    files = frozenset(member.host.name for member in members if member.has_files)
    return Appraiser(
        model="m", cuts=cuts, network=Network(topology), goal=goal, policy=policy, files=files
    )


def test_a_fast_link_makes_tensor_ranks_and_a_slow_one_does_not() -> None:
    """Two sums a layer: what they cost decides."""
    members = machines(2.0, 2.0)
    speeds = dict.fromkeys([("n0", "cpu:0"), ("n1", "cpu:0")], Speed(1e9, 2e10))
    shapes = {}
    for link in (BOLT, WIFI):
        topology = linked(names(members), link)
        found = plan(ask(), members, topology, medium(), None, speeds, kind="BF16")
        assert found.chosen is not None
        shapes[link.kind] = found.chosen.candidate.shape
        assert all(option.candidate.why for option in found.others)
    assert (shapes[Kind.THUNDERBOLT].tensor, shapes[Kind.WIFI].tensor) == (2, 1)


def test_shares_follow_speed_and_then_memory() -> None:
    members = machines(2.0, 2.0)
    speeds = {("n0", "cpu:0"): Speed(3e9, 6e10), ("n1", "cpu:0"): Speed(1e9, 2e10)}
    topology = linked(names(members), BOLT)

    def ffn(members: list[Member]) -> list[int]:
        shape = MeshShape.even(2, 1)
        found = plan(ask(shape), members, topology, medium(), None, speeds, kind="BF16")
        assert found.chosen is not None
        ranks = sorted(found.chosen.candidate.ranks, key=lambda rank: rank.node)
        return [len(rank.shard.ffn) for rank in ranks]

    fast, slow = ffn(members)
    assert fast > 2 * slow
    fast, slow = ffn(machines(0.52, 2.0))
    assert fast < slow


def test_a_model_too_large_for_any_machine_runs_over_two() -> None:
    members, spec = machines(0.9, 0.9), medium(num_hidden_layers=24)
    found = plan(ask(), members, linked(names(members)), spec, None, {}, kind="BF16")
    assert found.chosen is not None
    ranks = found.chosen.candidate.ranks
    assert len(ranks) == 2
    alone = next(o for o in found.others if o.candidate.shape.num_ranks == 1)
    assert "n0 cpu:0 has 0.90 GB, layers 0 to 24 take 1.17" in alone.candidate.why
    for rank in ranks:  # each has what it takes to meet the other
        assert rank.needs.process_bytes > 300e6


def test_more_steps_in_flight_make_a_pipeline_worth_its_while() -> None:
    members = machines(2.0, 2.0)
    speeds = dict.fromkeys([("n0", "cpu:0"), ("n1", "cpu:0")], Speed(1e9, 2e10))
    topology = linked(names(members), WIFI)
    shapes = []
    for in_flight in (1, 2):
        found = plan(
            ask(),
            members,
            topology,
            medium(vocab_size=2000),
            None,
            speeds,
            kind="BF16",
            goal=Goal.THROUGHPUT,
            policy=Policy(in_flight=in_flight),
        )
        assert found.chosen is not None
        shapes.append(found.chosen.candidate.shape.strategy)
    assert shapes == ["single", "pipeline"]


def test_files_that_are_there_and_a_running_instance_hold_a_placement() -> None:
    speeds = {("n0", "cpu:0"): Speed(1.00e10, 2e11), ("n1", "cpu:0"): Speed(1.01e10, 2.02e11)}
    members = machines(2.0, 2.0)
    topology = linked(names(members), WIFI)

    def node(members: list[Member], **options: Any) -> str:
        found = plan(ask(), members, topology, medium(), None, speeds, kind="BF16", **options)
        assert found.chosen is not None
        (rank,) = found.chosen.candidate.ranks
        return rank.node

    both = [replace(member, has_files=True) for member in members]
    assert node(both) == "n1"
    assert node([both[0], members[1]]) == "n0"
    assert node(both, current=(("n0", "cpu:0"),), policy=Policy(requests=100)) == "n0"
    assert node(both, current=(("n0", "cpu:0"),), policy=Policy(requests=100_000)) == "n1"


def test_machines_that_take_no_rank_say_why() -> None:
    members = machines(2.0, 0.1, 0.25, 2.0)
    members[3] = replace(members[3], roles=frozenset({"storage"}))
    topology = linked(["n0", "n1"])
    topology.add_node("n2")
    found = plan(ask(), members, topology, medium(), None, {}, kind="BF16")
    why = {fence.node: fence.why for fence in found.fenced}
    assert why["n1"].startswith("cpu:0 has 0.10 GB, a rank's process and workspace alone take 0.1")
    assert why["n2"].startswith("no link to another machine that computes; cpu:0 has 0.25 GB")
    assert why["n3"] == "has no compute role (storage)"


def test_what_was_asked_for_is_kept_to() -> None:
    members = machines(2.0, 2.0, 2.0, 2.0, 2.0)
    topology = linked(names(members))
    for shape in (MeshShape.even(2, 2), MeshShape(2, 1, (3.0, 1.0))):
        found = plan(ask(shape), members, topology, medium(), None, {}, kind="BF16")
        assert found.chosen is not None
        chosen = found.chosen.candidate.shape
        assert (chosen.tensor, chosen.pipeline) == (shape.tensor, shape.pipeline)
        assert {(o.candidate.shape.tensor, o.candidate.shape.pipeline) for o in found.others} <= {
            (shape.tensor, shape.pipeline)
        }
    assert chosen.shares == (3.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (MeshShape.even(9, 1), "9 tensor ranks, but 8 attention heads"),
        (MeshShape.even(1, 7), "7 pipeline stages, but 6 layers"),
        (MeshShape.even(2, 2), "4 ranks were asked for, 2 devices may take one"),
    ],
)
def test_a_shape_that_cannot_be_says_which_limit_it_breaks(shape: MeshShape, named: str) -> None:
    members = machines(2.0, 2.0)
    found = plan(ask(shape), members, linked(names(members)), medium(), None, {}, kind="BF16")
    assert found.chosen is None
    assert isinstance(found.refusal, IllegalShares | NoPlacement)
    assert named in str(found.refusal)


def test_nobody_to_compute_is_told_with_every_machine() -> None:
    members = [replace(m, roles=frozenset({"storage"})) for m in machines(1.0, 1.0)]
    found = plan(ask(), members, Topology(), medium(), None, {}, kind="BF16")
    assert found.chosen is None
    assert "n0 has no compute role (storage); n1 has no compute role" in str(found.refusal)


def test_many_devices_of_one_machine_are_many_ranks() -> None:
    members = machines(2.0, cuda_bytes=(GB, GB, GB, GB))
    speeds = {("n0", f"cuda:{i}"): Speed(1e9, 1e11) for i in range(4)}
    found = plan(ask(), members, Topology(), medium(), None, speeds, kind="BF16")
    assert found.chosen is not None
    assert found.chosen.candidate.shape.tensor == 4
    assert {rank.device for rank in found.chosen.candidate.ranks} == {f"cuda:{i}" for i in range(4)}
    assert found.placement.chosen is found.chosen.candidate


@pytest.mark.slow
def test_a_hundred_machines_are_planned_by_looking_at_few_arrangements() -> None:
    dice = random.Random(7)
    members = machines(*(dice.choice([0.2, 0.3, 0.4, 0.7]) for _ in range(100)))
    topology = linked(names(members), WIFI)
    near = [m.host.name for m in members if m.host.limit_bytes > 0.6 * GB][:3]
    for a, b in itertools.permutations(near, 2):
        topology.set_link(a, b, BOLT)
    speeds = {(m.host.name, "cpu:0"): Speed(2e9, 4e10) for m in members}
    found = plan(ask(), members, topology, medium(), None, speeds, kind="BF16")
    assert found.chosen is not None
    assert {rank.node for rank in found.chosen.candidate.ranks} == set(near)
    assert found.num_considered < 2000


@given(
    layers=st.integers(1, 12),
    stages=st.integers(1, 5),
    seed=st.integers(0, 999),
    open_=st.booleans(),
)
def test_layers_are_dealt_out_at_the_least_peak_and_at_the_least_sum(
    layers: int, stages: int, seed: int, open_: bool
) -> None:
    dice = np.random.default_rng(seed)
    costs = [dice.uniform(1, 9, (layers + 1, layers + 1)) for _ in range(stages)]
    if not open_:
        costs = [np.where(dice.random(cost.shape) < 0.3, math.inf, cost) for cost in costs]
    ways = [
        tuple(range(a, b) for a, b in itertools.pairwise((0, *edges, layers)))
        for edges in itertools.combinations(range(1, layers), stages - 1)
    ]

    def each(way: tuple[range, ...]) -> list[float]:
        return [float(cost[x.start, x.stop]) for cost, x in zip(costs, way, strict=True)]

    sums = [sum(each(way)) for way in ways]
    peaks = [max(each(way)) for way in ways]
    by_sum, by_peak = least_sum(costs), least_peak(costs)
    if not ways or min(sums) == math.inf:
        assert by_sum is None
        assert by_peak is None
        return
    assert by_sum is not None
    assert by_peak is not None
    assert sum(each(by_sum)) == pytest.approx(min(sums))
    assert max(each(by_peak)) == min(peaks)
    found = partition(layers, stages, lambda i, a, b: float(costs[i][a, b]))
    assert max(each(found)) == min(peaks)


@given(
    wanted=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    roomy=st.floats(1, 3),
)
def test_shares_stay_within_room_where_there_is_enough(
    wanted: list[float], seed: int, roomy: float
) -> None:
    dice = random.Random(seed)
    room = [dice.uniform(0, 1) for _ in wanted]
    room = [roomy * part / sum(room) for part in room]
    shares = within(wanted, room, 1000)
    assert sum(shares) == 1000
    assert all(share >= 1 for share in shares)
    assert all(s <= 1000 * r + len(wanted) + 1 for s, r in zip(shares, room, strict=True))
