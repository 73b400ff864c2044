"""Planning over many machines: limits hold, layers are covered, nothing better is overlooked."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control.appraise import Appraiser
from control.cost_model import Goal, Network, Policy, Seat, Speed, Stages
from control.load_options import MeshShape
from control.placement_request import Host, Request
from control.planner import Member, Option, Plan, plan
from control.rank_bytes import Assumed, Cuts
from control.seats import Speeds, seats_of
from control.topology import Kind, Link, Topology
from models.footprint import footprint
from models.mesh import mesh
from models.spec import ModelSpec
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
    """Every arrangement and every cut of the layers; tensor shares in tenths, in fifths if mixed."""
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
    """Within 3 %: the search tries tensor shares in tenths, the planner by speed and memory."""
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
        assert found.chosen.estimate.cost_s <= 1.03 * best


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
