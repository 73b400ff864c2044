"""Which addresses a node listens on, and which of another's is the fastest way to it.

A node named after loopback listens there alone. Named after an address of a network, it listens
on that one and on its machine's other private addresses, so that machines with a second, faster
link between them can use it. A public address is used only where the node is named after it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from control.discovery.candidates import Address

_SYS_NET: Final = Path("/sys/class/net")
_TRIES: Final = 8
_VIRTUAL: Final = ("docker", "br-", "virbr", "veth", "podman", "cni", "flannel", "vmnet", "vboxnet")
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One address of this machine.

    Attributes:
        prefix_bits: length of its subnet's prefix.
        speed_mbps: of its link; 0 where the system does not say.
    """

    name: str
    address: str
    prefix_bits: int
    speed_mbps: int = 0
    wireless: bool = False


def read_interfaces() -> list[Interface]:
    """Addresses of the interfaces that are up; IPv6 link-local ones are left out."""
    stats = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        if name not in stats or not stats[name].isup:
            continue
        for one in addresses:
            if one.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            ip = parse_ip(one.address)
            if ip is None or (ip.version == 6 and ip.is_link_local):
                continue
            found.append(
                Interface(
                    name=name,
                    address=str(ip),
                    prefix_bits=_prefix_bits(one.netmask, ip.max_prefixlen),
                    speed_mbps=stats[name].speed,
                    wireless=(_SYS_NET / name / "wireless").exists(),
                )
            )
    return found


def parse_ip(text: str) -> IpAddress | None:
    """``text`` as an address without its scope; None where it is a name."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether ``host`` means this machine alone."""
    ip = parse_ip(host)
    return ip.is_loopback if ip is not None else host.lower() == "localhost"


def resolve(host: str) -> list[str]:
    """All addresses of ``host``, now. Empty where the name is not known."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def listen_hosts(host: str, interfaces: Iterable[Interface]) -> list[str]:
    """Where a node named after ``host`` listens: ``host`` first."""
    if is_loopback(host):
        return [host]
    named = resolve(host)
    private = [one.address for one in interfaces if is_local_network(one)]
    return list(dict.fromkeys([*(named or [host]), *private]))


def is_local_network(interface: Interface) -> bool:
    """Whether other machines may reach us there and the wide world may not.

    Bridges to containers and virtual machines have the same address on every machine.
    """
    ip = ipaddress.ip_address(interface.address)
    private = ip.is_private and not ip.is_loopback and not ip.is_link_local
    return private and not interface.name.startswith(_VIRTUAL)


def bindable(hosts: Sequence[str], port: int) -> tuple[list[str], int]:
    """Those of ``hosts`` that can be bound, at one port free on all of them (0: any).

    Raises:
        OSError: not even the first can be bound.
    """
    for _ in range(_TRIES):
        with contextlib.ExitStack() as open_sockets:
            first = open_sockets.enter_context(_bound(hosts[0], port))
            chosen = int(first.getsockname()[1])
            good, taken = [hosts[0]], False
            for host in hosts[1:]:
                try:
                    open_sockets.enter_context(_bound(host, chosen))
                    good.append(host)
                except OSError:
                    taken = port == 0
        if not taken:
            break
    return good, chosen


def _bound(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def fastest_first(ours: Sequence[Interface], theirs: Iterable[Address]) -> list[Address]:
    """``theirs`` in the order to try: same machine, common wired subnet by speed, common wireless
    subnet, private address through a router, public address. IPv4 goes first where all is equal.
    """
    return sorted(dict.fromkeys(theirs), key=lambda address: _rank(ours, address))


def _rank(ours: Sequence[Interface], address: Address) -> tuple[int, int, int, str, int]:
    ip = parse_ip(address.host)
    if ip is None:
        return (4, 0, 0, address.host, address.port)
    tail = (ip.version, address.host, address.port)
    if ip.is_loopback or any(one.address == str(ip) for one in ours):
        return (0, 0, *tail)
    links = [one for one in ours if _same_subnet(one, ip)]
    wired = [one for one in links if not one.wireless]
    if wired:
        return (1, -max(one.speed_mbps for one in wired), *tail)
    if links:
        return (2, -max(one.speed_mbps for one in links), *tail)
    return (3 if ip.is_private else 5, 0, *tail)


def _same_subnet(interface: Interface, ip: IpAddress) -> bool:
    ours = ipaddress.ip_interface(f"{interface.address}/{interface.prefix_bits}")
    return ip.version == ours.version and not ours.ip.is_loopback and ip in ours.network


def _prefix_bits(netmask: str | None, whole: int) -> int:
    if not netmask:
        return whole
    mask = parse_ip(netmask)
    return bin(int(mask)).count("1") if mask is not None else whole


def address_towards(host: str) -> str | None:
    """Our own address on the way to ``host``; nothing is sent. None where there is no way."""
    for address in resolve(host):
        ip = ipaddress.ip_address(address)
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    return None
