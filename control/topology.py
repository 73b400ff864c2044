"""How machines are linked: a directed graph of nodes and measured links, and what it looks like.

Nothing is measured here; ``control.link_probe`` does, and tells the leader.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

import rustworkx

from bridge.term import Atom, Term
from bridge.text import text_of

MOST_CYCLES: Final = 1_000
MOST_LINES: Final = 200  # drawn
TYPICAL_BYTES: Final = 16_384  # of a message between ranks, to say which link is better


class Kind(StrEnum):
    """What a link is made of, fastest first."""

    NVLINK = "nvlink"
    NVSWITCH = "nvswitch"
    PCIE_X16 = "pcie_x16"
    PCIE_X8 = "pcie_x8"
    RDMA = "rdma"
    THUNDERBOLT = "thunderbolt"
    LOOPBACK = "loopback"
    ETHERNET = "ethernet"
    WIFI = "wifi"


FAST: Final = frozenset(Kind) - {Kind.LOOPBACK, Kind.ETHERNET, Kind.WIFI}


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a connection, as measured.

    Attributes:
        latency_s: of a small message, one way.
        bytes_per_s: of a large one.

    Raises:
        ValueError: a figure that nothing can have.
    """

    kind: Kind
    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        good = math.isfinite(self.latency_s) and self.latency_s >= 0
        if not (good and math.isfinite(self.bytes_per_s) and self.bytes_per_s > 0):
            raise ValueError(f"a link of {self.latency_s} s and {self.bytes_per_s} bytes/s")

    def seconds(self, size_bytes: float) -> float:
        """What a message takes."""
        return self.latency_s + size_bytes / self.bytes_per_s


class Topology:
    """Nodes by name; between two of them at most one link of each kind and direction.

    A link of a node to itself is what its own devices are linked by.
    """

    def __init__(self) -> None:
        self._graph: rustworkx.PyDiGraph[str, Link] = rustworkx.PyDiGraph()
        self._index: dict[str, int] = {}
        self._best: dict[str, dict[str, Link]] = {}  # placement asks thousands of times

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(sorted(self._index))

    def add_node(self, name: str) -> None:
        """Add a machine; one that is known stays as it is."""
        if name not in self._index:
            self._index[name] = self._graph.add_node(name)
            self._best[name] = {}

    def remove_node(self, name: str) -> None:
        """Take out a machine with its links; an unknown one is no error."""
        if name in self._index:
            self._graph.remove_node(self._index.pop(name))
            del self._best[name]
            for row in self._best.values():
                row.pop(name, None)

    def set_link(self, source: str, target: str, link: Link) -> None:
        """Record a measurement; it replaces that of the same direction and kind."""
        self.add_node(source)
        self.add_node(target)
        known = target in self._best[source]
        if known:
            self._drop(source, target, link.kind)
        self._graph.add_edge(self._index[source], self._index[target], link)
        if known:
            self._choose(source, target)
        else:
            self._best[source][target] = link

    def remove_link(self, source: str, target: str, kind: Kind | None = None) -> None:
        """Take out one kind of link, or all, of one direction; none is no error."""
        if target in self._best.get(source, ()):
            self._drop(source, target, kind)
            self._choose(source, target)

    def link(self, source: str, target: str) -> Link | None:
        """The best link of a direction; None where there is none."""
        row = self._best.get(source)
        return row.get(target) if row else None

    def row(self, source: str) -> Mapping[str, Link]:
        """The best link to every neighbour."""
        return MappingProxyType(self._best.get(source, {}))

    def links(self) -> Iterator[tuple[str, str, Link]]:
        """All of them as ``(source, target, link)``, sorted."""
        found = [
            (self._graph[a], self._graph[b], x) for a, b, x in self._graph.weighted_edge_list()
        ]
        return iter(sorted(found, key=lambda item: (item[0], item[1], item[2].kind)))

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Where its links lead, sorted, without itself."""
        return tuple(sorted(other for other in self._best.get(name, ()) if other != name))

    def leaves(self) -> tuple[str, ...]:
        """Machines that are linked with exactly one other, in whatever direction; sorted."""
        others: dict[str, set[str]] = {name: set() for name in self._index}
        for source, row in self._best.items():
            for target in row:
                others[source].add(target)
                others[target].add(source)
        return tuple(sorted(name for name, seen in others.items() if len(seen - {name}) == 1))

    def has_cycle(self, kind: Kind | None = None) -> bool:
        """Whether two machines or more are linked in a ring, of one kind of link throughout."""
        return any(
            len(part) > 1 for part in rustworkx.strongly_connected_components(self._plain(kind))
        )

    def cycles(
        self, kind: Kind | None = None, *, most: int = MOST_CYCLES
    ) -> Iterator[tuple[str, ...]]:
        """Rings of two machines or more, each once, beginning with its least name.

        There are more rings than anybody can list: the iterator ends after ``most``. Which come
        first does not depend on the order in which links were recorded.

        Args:
            kind: of link that the whole ring has; None takes any.
            most: rings given.

        Source: Johnson 1975, as in rustworkx.
        """
        graph = self._plain(kind)
        for ring in islice(rustworkx.simple_cycles(graph), most):
            names = [graph[index] for index in ring]
            at = names.index(min(names))
            yield (*names[at:], *names[:at])

    def to_term(self) -> list[Term]:
        """A list of maps: a link each; a machine without links is one with ``from`` alone."""
        found: list[Term] = [
            {
                Atom("from"): Atom(source),
                Atom("to"): Atom(target),
                Atom("kind"): Atom(link.kind.value),
                Atom("latency_s"): link.latency_s,
                Atom("bytes_per_s"): link.bytes_per_s,
            }
            for source, target, link in self.links()
        ]
        linked = {name for item in self.links() for name in item[:2]}
        return found + [{Atom("from"): Atom(n)} for n in self.nodes if n not in linked]

    @staticmethod
    def from_term(term: Term) -> Topology:
        """What ``to_term`` gave. Raises ValueError naming what is wrong."""
        made = Topology()
        if not isinstance(term, list):
            raise ValueError(f"a topology is a list of maps, not {type(term).__name__}")
        for item in term:
            match item:
                case {"from": source, "to": target, "kind": kind}:
                    latency_s, bytes_per_s = item.get("latency_s"), item.get("bytes_per_s")
                    if not (_is_number(latency_s) and _is_number(bytes_per_s)):
                        raise ValueError(f"figures of a link: {latency_s!r}, {bytes_per_s!r}")
                    link = Link(Kind(text_of(kind)), float(latency_s), float(bytes_per_s))
                    made.set_link(text_of(source), text_of(target), link)
                case {"from": source}:
                    made.add_node(text_of(source))
                case _:
                    raise ValueError(f"neither a link nor a machine: {str(item)[:80]}")
        return made

    def _drop(self, source: str, target: str, kind: Kind | None) -> None:
        for edge, link in self._edges(source, target):
            if kind is None or link.kind == kind:
                self._graph.remove_edge_from_index(edge)

    def _edges(self, source: str, target: str) -> list[tuple[int, Link]]:
        ends = self._index[source], self._index[target]
        found = self._graph.edge_indices_from_endpoints(*ends)
        return [(edge, self._graph.get_edge_data_by_index(edge)) for edge in found]

    def _choose(self, source: str, target: str) -> None:
        links = [link for _, link in self._edges(source, target)]
        self._best[source].pop(target, None)
        if links:
            self._best[source][target] = min(links, key=_slowness)

    def _plain(self, kind: Kind | None) -> rustworkx.PyDiGraph[str, None]:
        """Nodes in order, at most one edge a direction, none to itself."""
        graph: rustworkx.PyDiGraph[str, None] = rustworkx.PyDiGraph()
        names = self.nodes
        index = dict(zip(names, graph.add_nodes_from(list(names)), strict=True))
        pairs: Iterable[tuple[str, str]]
        if kind is None:
            pairs = ((a, b) for a in names for b in sorted(self._best[a]))
        else:
            pairs = ((a, b) for a, b, link in self.links() if link.kind == kind)
        graph.add_edges_from_no_data([(index[a], index[b]) for a, b in pairs if a != b])
        return graph


def draw(topology: Topology, *, most_lines: int = MOST_LINES) -> str:
    """What ``ctl topology`` shows: under each machine its links to those that come after it.

    Both directions are on one line, there / back. A link to itself stands beside the name.
    """
    nodes = topology.nodes
    kinds: dict[tuple[str, str, Kind], Link] = {(a, b, x.kind): x for a, b, x in topology.links()}
    under: dict[str, list[tuple[str, Kind]]] = {name: [] for name in nodes}
    for pair in sorted({(min(a, b), max(a, b), kind) for a, b, kind in kinds if a != b}):
        under[pair[0]].append(pair[1:])
    width = max(map(len, nodes), default=0)
    lines = []
    for name in nodes:
        own = [x for (a, b, _), x in sorted(kinds.items()) if a == b == name]
        lines.append(name + "".join(f"  ({x.kind.value} {_figures(x, x)})" for x in own))
        for number, (other, kind) in enumerate(under[name], 1):
            there, back = kinds.get((name, other, kind)), kinds.get((other, name, kind))
            branch = "└─" if number == len(under[name]) else "├─"
            line = f"{branch} {other:{width}}  {kind.value:11}  {_figures(there, back)}"
            lines.append(line.rstrip())
    count = sum(map(len, under.values()))
    head = f"{_count(len(nodes), 'machine')}, {_count(count, 'link')}"
    leaves = topology.leaves()
    if leaves and len(nodes) > 2:
        head += f"; at the end of one link: {', '.join(leaves[:8])}"
        head += f" and {len(leaves) - 8} more" if len(leaves) > 8 else ""
    if len(lines) > most_lines:
        lines = [*lines[:most_lines], f"... {len(lines) - most_lines} more lines; see --json"]
    return "\n".join([head, *lines])


def _figures(there: Link | None, back: Link | None) -> str:
    if there == back and there is not None:
        return f"{1e3 * there.latency_s:.3g} ms  {_rate(there)}"
    latency = " / ".join(f"{1e3 * x.latency_s:.3g}" if x else "-" for x in (there, back))
    return f"{latency} ms  " + " / ".join(_rate(x) if x else "-" for x in (there, back))


def _rate(link: Link) -> str:
    mega = link.bytes_per_s / 1e6
    return f"{mega / 1e3:.3g} GB/s" if mega >= 1000 else f"{mega:.3g} MB/s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _slowness(link: Link) -> tuple[float, str]:
    return link.seconds(TYPICAL_BYTES), link.kind


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
