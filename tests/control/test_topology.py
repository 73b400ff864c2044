"""The graph of machines and links: what it keeps, what it finds, what it looks like."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import etf
from control.topology import Kind, Link, Topology, draw

LAN = Link(Kind.ETHERNET, 2e-4, 1.18e8)
WIFI = Link(Kind.WIFI, 4e-3, 5e6)
BOLT = Link(Kind.THUNDERBOLT, 5e-5, 3e9)

names = st.sampled_from("abcdef")
kinds = st.sampled_from([LAN, WIFI, BOLT])
steps = st.lists(
    st.tuples(st.sampled_from(["set", "set", "remove", "node", "forget"]), names, names, kinds),
    max_size=40,
)


def built(moves: list[tuple[str, str, str, Link]]) -> Topology:
    topology = Topology()
    for what, a, b, link in moves:
        match what:
            case "set":
                topology.set_link(a, b, link)
            case "remove":
                topology.remove_link(a, b, link.kind)
            case "node":
                topology.add_node(a)
            case _:
                topology.remove_node(a)
    return topology


@pytest.mark.slow
@given(moves=steps)
def test_it_keeps_what_a_table_would_keep(moves: list[tuple[str, str, str, Link]]) -> None:
    topology, table, nodes = built(moves), {}, set[str]()
    for what, a, b, link in moves:
        if what == "set":
            table[a, b, link.kind] = link
            nodes |= {a, b}
        elif what == "remove":
            table.pop((a, b, link.kind), None)
        elif what == "node":
            nodes.add(a)
        else:
            nodes.discard(a)
            table = {key: x for key, x in table.items() if a not in key[:2]}
    assert topology.nodes == tuple(sorted(nodes))
    assert {(a, b, x.kind): x for a, b, x in topology.links()} == table
    for a, b in itertools.product("abcdef", repeat=2):
        links = [x for (c, d, _), x in table.items() if (c, d) == (a, b)]
        best = min(links, key=lambda x: x.seconds(16384)) if links else None
        assert topology.link(a, b) == best
        assert (b in topology.neighbours(a)) == (best is not None and a != b)
    leaves = set()
    for name in nodes:
        others = {x for key in table for x in key[:2] if name in key[:2]} - {name}
        leaves |= {name} if len(others) == 1 else set()
    assert set(topology.leaves()) == leaves


@pytest.mark.slow
@given(moves=steps)
def test_it_travels_as_terms(moves: list[tuple[str, str, str, Link]]) -> None:
    topology = built(moves)
    again = Topology.from_term(etf.decode(etf.encode(topology.to_term())))
    assert again.nodes == topology.nodes
    assert list(again.links()) == list(topology.links())


@pytest.mark.slow
@given(moves=steps, kind=st.sampled_from([None, *[x.kind for x in (LAN, WIFI, BOLT)]]))
def test_rings_are_those_that_walking_finds(
    moves: list[tuple[str, str, str, Link]], kind: Kind | None
) -> None:
    topology = built(moves)
    arrows = {(a, b) for a, b, x in topology.links() if kind is None or x.kind == kind}
    wanted = set()
    for size in range(2, len(topology.nodes) + 1):
        for ring in itertools.permutations(topology.nodes, size):
            closed = zip(ring, (*ring[1:], ring[0]), strict=True)
            if ring[0] == min(ring) and all(step in arrows for step in closed):
                wanted.add(ring)
    found = list(topology.cycles(kind))
    assert len(found) == len(set(found))
    assert set(found) == wanted or len(found) == 1000
    assert topology.has_cycle(kind) == bool(wanted)


def full(count: int) -> Topology:
    topology = Topology()
    for a, b in itertools.permutations([f"n{i:02}" for i in range(count)], 2):
        topology.set_link(a, b, LAN)
    return topology


def test_rings_of_a_full_mesh_are_never_all_listed() -> None:
    assert len(list(full(30).cycles(most=50))) == 50
    assert list(full(3).cycles()) == list(full(3).cycles(Kind.ETHERNET))
    assert not list(full(3).cycles(Kind.WIFI))


def test_a_line_has_no_ring_and_two_leaves() -> None:
    topology = Topology()
    for a, b in itertools.pairwise("abcd"):
        topology.set_link(a, b, LAN)
    assert not topology.has_cycle()
    assert topology.leaves() == ("a", "d")
    assert topology.neighbours("b") == ("c",)


def test_a_drawing_shows_every_link_once_with_both_directions() -> None:
    topology = Topology()
    topology.set_link("a@h1", "b@h2", LAN)
    topology.set_link("b@h2", "a@h1", Link(Kind.ETHERNET, 3e-4, 1.17e8))
    topology.set_link("a@h1", "c@h3", BOLT)
    topology.set_link("c@h3", "a@h1", BOLT)
    topology.set_link("c@h3", "b@h2", WIFI)
    topology.set_link("a@h1", "a@h1", Link(Kind.NVLINK, 3e-6, 3e11))
    topology.add_node("d@h4")
    topology.set_link("e@h5", "a@h1", LAN)
    assert draw(topology).splitlines() == [
        "5 machines, 4 links; at the end of one link: e@h5",
        "a@h1  (nvlink 0.003 ms  300 GB/s)",
        "├─ b@h2  ethernet     0.2 / 0.3 ms  118 MB/s / 117 MB/s",
        "├─ c@h3  thunderbolt  0.05 ms  3 GB/s",
        "└─ e@h5  ethernet     - / 0.2 ms  - / 118 MB/s",
        "b@h2",
        "└─ c@h3  wifi         - / 4 ms  - / 5 MB/s",
        "c@h3",
        "d@h4",
        "e@h5",
    ]
    assert draw(full(40), most_lines=9).splitlines()[-1] == "... 811 more lines; see --json"
    assert draw(Topology()) == "0 machines, 0 links"


@pytest.mark.parametrize("figures", [(-1.0, 1.0), (math.nan, 1.0), (0.1, 0.0), (0.1, math.inf)])
def test_a_link_that_nothing_can_be_is_refused(figures: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="a link of"):
        Link(Kind.WIFI, *figures)


@pytest.mark.parametrize(
    "term",
    [
        {},
        ["a"],
        [{"to": "b"}],
        [{"from": "a", "to": "b", "kind": "string", "latency_s": 1.0, "bytes_per_s": 1.0}],
        [{"from": "a", "to": "b", "kind": "wifi", "latency_s": True, "bytes_per_s": 1.0}],
        [{"from": "a", "to": "b", "kind": "wifi", "latency_s": 1.0}],
    ],
)
def test_terms_that_are_no_topology_are_refused(term: object) -> None:
    with pytest.raises(ValueError, match=r"topology|neither|string|figures"):
        Topology.from_term(term)
