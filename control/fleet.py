"""The machines that are up as placement sees them: what they have, lend, and how they are linked.

``read_fleet`` asks the servers of this node; everything else is pure.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, Final

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Term
from bridge.text import text_of
from control.cost_model import Speed
from control.device_speed import speeds_from
from control.machine import machine_of
from control.meeting import Reaches, meet, reaches_from
from control.placement_request import Host, host_of
from control.placement_types import MEMORY
from control.seats import COMPUTE, Member, Speeds
from control.topology import Kind, Link, Topology

log = logging.getLogger("control.fleet")

ASK_S: Final = 5.0
# Between machines that are connected and have not measured their link yet.
ASSUMED: Final = Link(Kind.ETHERNET, 1e-3, 1e8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A snapshot.

    Attributes:
        members: machines that are up, sorted by name.
        topology: measured links; those that nobody has measured yet are assumed.
        speeds: by node and device, as far as they are measured.
        reaches: addresses of each node.
    """

    members: tuple[Member, ...]
    topology: Topology = field(default_factory=Topology)
    speeds: Speeds = field(default_factory=dict)
    reaches: Reaches = field(default_factory=dict)

    @staticmethod
    def of_host(host: Host) -> Fleet:
        """One machine alone."""
        return Fleet(members=(Member(host=host),))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the machines, sorted."""
        return tuple(member.host.name for member in self.members)

    @property
    def roles(self) -> dict[str, frozenset[str]]:
        """Of each machine."""
        return {member.host.name: member.roles for member in self.members}

    @property
    def computing(self) -> tuple[Member, ...]:
        """Machines that may run ranks."""
        return tuple(member for member in self.members if COMPUTE in member.roles)

    @property
    def addresses(self) -> dict[str, str]:
        """Of every node the host where all others meet its ranks."""
        return {node: reach.host for node, reach in meet(self.reaches).items()}

    def addresses_of(self, nodes: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """Where ranks on these nodes meet, as ``InstanceSpec.addresses``; empty for one node."""
        chosen = sorted(set(nodes))
        if len(chosen) < 2:
            return ()
        found = meet({node: self.reaches.get(node, ()) for node in chosen})
        return tuple((node, found[node].host) for node in chosen)

    def member(self, node: str) -> Member | None:
        """A machine by name; None where it is not up."""
        return next((one for one in self.members if one.host.name == node), None)

    def with_used(self, used: Mapping[tuple[str, str], int]) -> Fleet:
        """With what instances take, in bytes by ``(node, pool)``; it replaces what was known.

        Pools as in ``placement_types.RankPlace``: ``memory``, or ``cuda:N``.
        """
        return replace(
            self,
            members=tuple(replace(one, host=_with_used(one.host, used)) for one in self.members),
        )

    def without(self, nodes: Collection[str]) -> Fleet:
        """The others."""
        topology = Topology.from_term(self.topology.to_term())
        for node in nodes:
            topology.remove_node(node)
        return replace(
            self,
            members=tuple(one for one in self.members if one.host.name not in nodes),
            topology=topology,
            speeds={key: speed for key, speed in self.speeds.items() if key[0] not in nodes},
            reaches={node: found for node, found in self.reaches.items() if node not in nodes},
        )

    def with_files(self, nodes: Collection[str]) -> Fleet:
        """With the machines that have the files of the model to place; no others have them."""
        return replace(
            self,
            members=tuple(replace(one, has_files=one.host.name in nodes) for one in self.members),
        )


def _with_used(host: Host, used: Mapping[tuple[str, str], int]) -> Host:
    cuda = tuple(used.get((host.name, f"cuda:{i}"), 0) for i in range(len(host.cuda_bytes)))
    taken, limit_bytes = used.get((host.name, MEMORY), 0), host.limit_bytes
    if host.available_bytes is not None:  # other programs have the rest
        limit_bytes = min(limit_bytes, host.available_bytes + taken)
    return replace(host, limit_bytes=limit_bytes, used_bytes=taken, cuda_used_bytes=cuda)


async def read_fleet(me: Process, *, timeout_s: float = ASK_S) -> Fleet:
    """Ask ``membership`` and ``link_probe`` of this node what the cluster is now.

    Args:
        me: who asks.
        timeout_s: of each of the two calls.

    Raises:
        gen_server.CallError: membership does not answer. Without ``link_probe`` every link is
            assumed.
    """
    rows = await gen_server.call(me, Atom("membership"), Atom("nodes"), timeout_s=timeout_s)
    try:
        links = await gen_server.call(me, Atom("link_probe"), Atom("topology"), timeout_s=timeout_s)
    except gen_server.CallError as exc:  # it is being restarted
        log.warning("links are assumed: %s", exc)
        links = []
    return await asyncio.to_thread(fleet_of, rows, links)  # a second's work for 1,000 machines


def fleet_of(rows: Sequence[Mapping[Any, Any]], links: Term) -> Fleet:
    """From ``membership``'s ``nodes`` and ``link_probe``'s ``topology``.

    A row that cannot be read is left out, with a line in the log.
    """
    members, reaches = [], {}
    speeds: dict[tuple[str, str], Speed] = {}
    for row in rows:
        if row["state"] != "up":
            continue
        node = text_of(row["name"])
        try:
            host = host_of(node, machine_of(row), 0)
            found = speeds_from(row.get("speeds", []))
            reaches[node] = reaches_from(row.get("addresses", []))
        except (KeyError, TypeError, ValueError) as exc:
            log.warning("the facts of %s cannot be read: %s: %s", node, type(exc).__name__, exc)
            continue
        speeds |= {(node, device): speed for device, speed in found.items()}
        members.append(Member(host=host, roles=frozenset(text_of(r) for r in row["roles"])))
    members.sort(key=lambda member: member.host.name)
    names = [member.host.name for member in members]
    return Fleet(
        members=tuple(members), topology=_linked(names, links), speeds=speeds, reaches=reaches
    )


def _linked(nodes: Sequence[str], links: Term) -> Topology:
    """Measured links among ``nodes``; the other direction, or an assumption, for the rest."""
    topology = Topology()
    try:
        measured = Topology.from_term(links)
    except ValueError as exc:
        log.warning("links are assumed: %s", exc)
        measured = Topology()
    known = set(nodes)
    for source, target, link in measured.links():
        if source in known and target in known:
            topology.set_link(source, target, link)
    for node in nodes:
        topology.add_node(node)
    for a, b in permutations(nodes, 2):
        if measured.link(a, b) is None:
            topology.set_link(a, b, measured.link(b, a) or ASSUMED)
    return topology
