"""Where the ranks of several machines meet: of each the address on the fastest network they share.

Each machine tells its own addresses with the facts of ``membership``; everything here is pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.term import Atom, Term
from bridge.text import text_of
from control.discovery.addresses import Interface, is_loopback, parse_ip
from control.topology import Kind

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_BY_NAME = (("thunderbolt", Kind.THUNDERBOLT), ("ib", Kind.RDMA))  # Linux names them so


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """One address at which others reach a machine.

    Attributes:
        prefix_bits: of its network; 0 where ``host`` is a name, or the network is not known.
        speed_mbps: of the interface; 0 where the system does not say.
        kind: of link that the interface is.
    """

    host: str
    prefix_bits: int = 0
    speed_mbps: int = 0
    kind: Kind = Kind.ETHERNET

    @property
    def network(self) -> _Network | None:
        """That it is in; None where that is not known."""
        ip = parse_ip(self.host)
        if ip is None or not self.prefix_bits:
            return None
        return ipaddress.ip_network(f"{ip}/{self.prefix_bits}", strict=False)


Reaches = Mapping[str, Sequence[Reach]]  # by node, the one that it is named after first


def reaches_of(hosts: Iterable[str], interfaces: Sequence[Interface]) -> tuple[Reach, ...]:
    """What this machine tells of the addresses that it listens on."""
    by_address = {one.address: one for one in interfaces}
    return tuple(_reach(host, by_address.get(host)) for host in dict.fromkeys(hosts))


def _reach(host: str, interface: Interface | None) -> Reach:
    if is_loopback(host):
        return Reach(host=host, prefix_bits=8 if parse_ip(host) else 0, kind=Kind.LOOPBACK)
    if interface is None:
        return Reach(host=host)
    kind = Kind.WIFI if interface.wireless else Kind.ETHERNET
    for start, named in _BY_NAME:
        if interface.name.startswith(start):
            kind = named
    return Reach(
        host=host,
        prefix_bits=interface.prefix_bits,
        speed_mbps=interface.speed_mbps,
        kind=kind,
    )


def meet(reaches: Reaches) -> dict[str, Reach]:
    """Of each node the address to meet the others at.

    The fastest network that all have an address in: wired before wireless, then by the slowest
    interface in it. Where they share none, each is met at the address that it is named after.
    """
    nodes = sorted(reaches)
    shared: dict[_Network, dict[str, Reach]] = {}
    for node in nodes:
        for reach in reaches[node]:
            network = reach.network
            if network is not None and (reach.kind != Kind.LOOPBACK or len(reaches[node]) == 1):
                shared.setdefault(network, {}).setdefault(node, reach)
    common = [(net, found) for net, found in shared.items() if len(found) == len(nodes)]
    if common:
        return min(common, key=_slowness)[1]
    return {node: (reaches[node] or (Reach(host=node.partition("@")[2]),))[0] for node in nodes}


def _slowness(item: tuple[_Network, dict[str, Reach]]) -> tuple[bool, int, int, str]:
    network, found = item
    wireless = any(reach.kind == Kind.WIFI for reach in found.values())
    slowest = min(reach.speed_mbps for reach in found.values())
    return wireless, -slowest, network.version, str(network)


def link_kind(a: Reach, b: Reach) -> Kind:
    """Of the link between two machines that meet there: what its slower end is made of."""
    order = list(Kind)
    return max(a.kind, b.kind, key=order.index)


def reaches_term(reaches: Iterable[Reach]) -> list[Term]:
    """As membership tells them; ``reaches_from`` reads it."""
    return [
        {
            Atom("host"): reach.host,
            Atom("prefix_bits"): reach.prefix_bits,
            Atom("speed_mbps"): reach.speed_mbps,
            Atom("kind"): Atom(reach.kind.value),
        }
        for reach in reaches
    ]


def reaches_from(term: Any) -> tuple[Reach, ...]:
    """Read ``reaches_term``'s answer. Raises KeyError, TypeError, ValueError."""
    return tuple(
        Reach(
            host=text_of(one["host"]),
            prefix_bits=int(one["prefix_bits"]),
            speed_mbps=int(one["speed_mbps"]),
            kind=Kind(text_of(one["kind"])),
        )
        for one in term
    )
