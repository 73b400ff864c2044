"""How this node meets others: its address, what it announces and where it looks, from the settings.

Closed by default: a node named after loopback listens there alone, announces nothing and looks
for nobody, unless the configuration says ``discovery: epmd`` or names peers on this machine.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from bridge.node import Node
from bridge.tls import TlsFiles
from control.discovery.addresses import (
    Interface,
    address_towards,
    is_local_network,
    is_loopback,
    read_interfaces,
    resolve,
)
from control.discovery.candidates import Address, Identity, parse_peer
from control.discovery.epmd_strategy import EpmdStrategy
from control.discovery.static_strategy import StaticStrategy
from control.discovery.strategy import Strategy
from ops.config import Config
from ops.errors import BadUsage
from ops.start_settings import StartSettings

DEFAULT_SHORT_NAME = "phalanx"
DOCUMENTATION_HOST = "192.0.2.1"  # RFC 5737: stands for any host out there; nothing is sent to it


@dataclass(frozen=True, slots=True)
class Joining:
    """``strategies`` makes new ones for each life of discovery."""

    identity: Identity
    addresses: Callable[[], tuple[Address, ...]]
    strategies: Callable[[], Sequence[Strategy]]


def software_version() -> str:
    """Of this installation; machines of one cluster should have the same."""
    try:
        return version("phalanx")
    except PackageNotFoundError:
        return "source"


def make_joining(
    node: Node,
    settings: StartSettings,
    config: Config,
    cookie: str,
    hosts: Sequence[str],
    tls: TlsFiles | None,
) -> Joining:
    """Effects of discovery; ``hosts``: the addresses that the distribution listens on."""
    identity = Identity(
        node=settings.node,
        cluster=config.cluster_name,
        version=software_version(),
        cookie=cookie,
    )
    client_tls = tls.contexts()[1] if tls else None

    def addresses() -> tuple[Address, ...]:
        return tuple(Address(h, node.address[1]) for h in hosts) if node.address else ()

    def strategies() -> list[Strategy]:
        found: list[Strategy] = []
        here = is_loopback(settings.node.partition("@")[2])
        if config.network.discovery == "auto" and not here and node.address:
            # Here, for a node that is alone has no use for it and starts faster without.
            from control.discovery.zeroconf_strategy import ZeroconfStrategy

            found.append(
                ZeroconfStrategy(
                    identity, hosts=hosts, port=node.address[1], interfaces=read_interfaces
                )
            )
        if config.network.discovery == "epmd":
            found.append(EpmdStrategy(identity, epmd_port=settings.epmd_port, tls=client_tls))
        peers = tuple(dict.fromkeys((*config.network.peers, *settings.join)))
        if peers:
            found.append(
                StaticStrategy(
                    peers,
                    identity,
                    connected=node.nodes,
                    epmd_port=settings.epmd_port,
                    tls=client_tls,
                )
            )
        return found

    return Joining(identity, addresses, strategies)


def check_peer(peer: str) -> str:
    """``peer`` if ``--join`` can take it. Raises BadUsage."""
    try:
        parse_peer(peer)
    except ValueError as exc:
        raise BadUsage(f"--join {peer!r}: write HOST or HOST:PORT ({exc})") from exc
    return peer


def choose_node_name(given: str | None, config: Config, join: Sequence[str]) -> str:
    """The node's name: as said, else the default, after an address that the others reach.

    Args:
        given: of ``--name``; it and ``node.name`` are taken as they are.

    Raises:
        BadUsage: other machines are to be joined by a node that they cannot reach.
    """
    peers = [parse_peer(peer)[0] for peer in (*config.network.peers, *join)]
    away = [host for host in peers if not is_loopback(host)]
    if given is not None or "name" in config.node.model_fields_set:
        name = given or config.node.name
        if away and is_loopback(name.partition("@")[2]):
            raise BadUsage(
                f"node {name} listens on this machine alone, so {away[0]} cannot be joined. "
                f"Give it an address that other machines reach: --name NAME@ADDRESS"
            )
        return name
    for host in away:
        own = address_towards(host)
        if own is not None and ":" not in own:
            return f"{DEFAULT_SHORT_NAME}@{own}"
    if away:
        raise BadUsage(
            f"no way to {away[0]} from this machine now; check its name and the network, or say "
            f"which of our addresses it reaches: --name NAME@ADDRESS"
        )
    if len(config.devices) > 1:
        interfaces = read_interfaces()
        listed = listed_host(config, interfaces)
        if listed is not None:
            return f"{DEFAULT_SHORT_NAME}@{listed}"
        own = primary_address(interfaces)
        if own is not None:
            return f"{DEFAULT_SHORT_NAME}@{own}"
    return config.node.name


def own_host_names() -> frozenset[str]:
    """Names under which ``devices`` may list this machine, in lower case."""
    name = socket.gethostname()
    return frozenset(one.lower() for one in (name, socket.getfqdn(), f"{name}.local"))


def listed_host(config: Config, interfaces: Sequence[Interface]) -> str | None:
    """The host name of this machine in ``devices``, where it means an address of its networks."""
    ours = {one.address for one in interfaces if not is_loopback(one.address)}
    for device in config.devices:
        if device.hostname.lower() in own_host_names() and ours.intersection(
            resolve(device.hostname)
        ):
            return device.hostname
    return None


def configured_machines(node: str, config: Config) -> tuple[tuple[str, ...], str]:
    """Nodes whose majority decides, and the tie-breaker among them.

    They are known where nodes are named after the ``hostname`` of their device, as they are by
    default where those names can be resolved; else the machines that have joined decide, and no
    nodes are returned.
    """
    short_name = node.partition("@")[0]
    machines = tuple(f"{short_name}@{device.hostname}" for device in config.devices)
    breaker = config.network.tie_breaker
    tie_breaker = f"{short_name}@{breaker}" if breaker else ""
    return (machines if node in machines else ()), tie_breaker


def primary_address(interfaces: Sequence[Interface]) -> str | None:
    """The private IPv4 address on the way out, else the first; None without a local network."""
    private = [
        one.address for one in interfaces if ":" not in one.address and is_local_network(one)
    ]
    outwards = address_towards(DOCUMENTATION_HOST)
    return outwards if outwards in private else min(private, default=None)
