"""The supervision tree of a node. READ THIS FIRST: everything that runs hangs here.

heart                     OS parent (ops/heart.py): restarts the control process
└─ root_sup               rest_for_one: what comes later needs what comes before
   ├─ events              what happened, on any node, and who wants to hear of it
   ├─ cluster_sup         rest_for_one
   │  ├─ membership       machines, which are up, their memory and devices
   │  ├─ election         who leads, since which epoch
   │  ├─ agent            starts and stops instances here, as the leader says
   │  ├─ scheduler        which instances should run, which do
   │  ├─ discovery        sees other machines and connects to them
   │  ├─ link_probe       measures the links to them
   │  └─ speed_meter      has each device measured, once
   ├─ model_store         files of models
   ├─ ports               OS children: spares, leases, kills
   ├─ instance_sup        one_for_one, dynamic
   │  └─ <instance>_sup   one_for_all: a model's ranks and their coordinator
   ├─ cluster             answers Erlang, ctl and the shells
   └─ gateway             HTTP
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.process import Process
from bridge.term import Atom, Pid
from control import supervisor
from control.agent import Agent
from control.cluster import Cluster
from control.cluster_api import ClusterApi
from control.discovery.addresses import read_interfaces
from control.discovery.candidates import Address, Identity
from control.discovery.server import Discovery
from control.discovery.strategy import Strategy as DiscoveryStrategy
from control.election import Election
from control.errors import UnknownModel
from control.events import Events
from control.gateway.process import BoundAddress, GatewayServer
from control.gateway.settings import GatewaySettings
from control.gpu_links import gpu_link
from control.link_probe import LinkProbe, TcpTransport
from control.lookup import Lookup, Resolved
from control.machine import Limits, is_busy, read_machine
from control.meeting import Reach, reaches_of
from control.membership import Membership
from control.model_store import ModelStore
from control.model_store_server import ModelStoreServer
from control.names import until_free
from control.placement_request import Defaults
from control.ports import Ports, StartPort
from control.rank import RankLimits
from control.scheduler import Scheduler
from control.spec import ChildSpec, ChildType, Strategy, SupSpec
from control.speed_meter import SpeedMeter
from models.card import find_card


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All that the tree is made of: settings and effects, passed in once."""

    api: ClusterApi
    store: ModelStore
    address: BoundAddress
    start_port: StartPort
    stop: Callable[[bool], None]
    state_dir: Path
    roles: tuple[str, ...]
    machine_limits: Limits
    identity: Identity
    addresses: Callable[[], tuple[Address, ...]]
    strategies: Callable[[], Sequence[DiscoveryStrategy]]
    machines: tuple[str, ...]
    tie_breaker: str
    defaults: Defaults
    rank_limits: RankLimits
    autoload: bool
    num_spares: int
    port_prefix: str
    drain_s: float
    gateway: GatewaySettings
    insecure: bool


async def start_tree(me: Process, parts: Parts) -> Pid:
    """Start ``root_sup`` linked to ``me``. Raises StartError with the child that failed."""
    return await supervisor.start_link(me, root_sup(parts), name="root_sup")


def root_sup(p: Parts) -> SupSpec:
    """The whole tree as data."""
    return SupSpec(
        strategy=Strategy.REST_FOR_ONE,
        intensity=5,
        period_s=30,
        children=(
            _server("events", Events),
            _supervisor("cluster_sup", cluster_sup(p)),
            _server("model_store", partial(_model_store, p)),
            _server("ports", partial(_ports, p), shutdown_s=15.0),
            _supervisor("instance_sup", SupSpec(strategy=Strategy.ONE_FOR_ONE)),
            _supervisor("surface_sup", surface_sup(p)),
        ),
    )


def cluster_sup(p: Parts) -> SupSpec:
    """The brain: each part may rely on the ones before it."""
    return SupSpec(
        strategy=Strategy.REST_FOR_ONE,
        intensity=5,
        period_s=30,
        children=(
            _server(
                "membership",
                partial(
                    Membership,
                    partial(read_machine, p.machine_limits),
                    p.roles,
                    identity=p.identity,
                    addresses=p.addresses,
                    reaches=partial(_reaches, p),
                ),
            ),
            _server(
                "election",
                partial(
                    Election,
                    p.state_dir / "epoch",
                    candidate="coordinator" in p.roles,
                    machines=p.machines,
                    tie_breaker=p.tie_breaker,
                ),
            ),
            _server(
                "agent",
                partial(Agent, p.rank_limits, record_path=p.state_dir / "groups.etf"),
            ),
            _server("scheduler", partial(_scheduler, p)),
            # Last, so that their faults restart nothing that others rely on.
            _server("discovery", lambda: Discovery(p.strategies(), interfaces=read_interfaces)),
            _server("link_probe", partial(_link_probe, p)),
            *([_server("speed_meter", partial(_speed_meter, p))] if "compute" in p.roles else []),
        ),
    )


def surface_sup(p: Parts) -> SupSpec:
    """What people and programs talk to."""
    return SupSpec(
        strategy=Strategy.ONE_FOR_ONE,
        intensity=5,
        period_s=30,
        children=(
            _server("cluster", partial(Cluster, p.api, stop=p.stop)),
            _server("gateway", partial(_gateway, p)),
        ),
    )


def _reaches(p: Parts) -> tuple[Reach, ...]:
    return reaches_of([address.host for address in p.addresses()], read_interfaces())


def _link_probe(p: Parts) -> LinkProbe:
    return LinkProbe(
        TcpTransport(),
        hosts=lambda: [address.host for address in p.addresses()],
        inside=gpu_link if p.machine_limits.gpu is not False else lambda: None,
        busy=is_busy,
        now_s=time.monotonic,
        random=random.random,
    )


def _speed_meter(p: Parts) -> SpeedMeter:
    return SpeedMeter(
        p.state_dir / "speeds.json",
        partial(read_machine, p.machine_limits),
        used_percent=psutil.cpu_percent,
    )


def _scheduler(p: Parts) -> Scheduler:
    def resolve(ref: str) -> Resolved:
        found = p.store.resolve(ref)
        return Resolved(found.id, ref, p.store.path_of(found), found.card)

    def card_of(name: str) -> str:
        card = find_card(p.store.cards, name)
        if card is None:
            raise UnknownModel(name, tuple(p.store.cards))
        return card.id

    return Scheduler(
        Lookup(resolve=resolve, card_of=card_of),
        desired_path=p.state_dir / "desired.json",
        defaults=p.defaults,
        autoload=p.autoload,
    )


def _model_store(p: Parts) -> ModelStoreServer:
    return ModelStoreServer(p.store, hosts=lambda: [one.host for one in p.addresses()])


def _ports(p: Parts) -> Ports:
    return Ports(
        p.start_port,
        record_path=p.state_dir / "ports.json",
        num_spares=p.num_spares,
        name_prefix=p.port_prefix,
    )


def _gateway(p: Parts) -> GatewayServer:
    return GatewayServer(
        p.api,
        p.address,
        drain_s=p.drain_s,
        settings=p.gateway,
        insecure=p.insecure,
    )


def _server(
    name: str, make: Callable[[], GenServer], *, shutdown_s: float | None = None
) -> ChildSpec:
    """A permanent server registered as ``name``."""

    async def start(me: Process) -> Pid:
        await until_free(me, name)
        return await gen_server.start_link(me, make(), name=name)

    return _child(name, start, ChildType.WORKER, shutdown_s)


def _supervisor(name: str, spec: SupSpec) -> ChildSpec:
    """A permanent supervisor registered as ``name``."""

    async def start(me: Process) -> Pid:
        await until_free(me, name)
        return await supervisor.start_link(me, spec, name=name)

    return _child(name, start, ChildType.SUPERVISOR, None)


def _child(
    name: str,
    start: Callable[[Process], Awaitable[Pid]],
    type_: ChildType,
    shutdown_s: float | None,
) -> ChildSpec:
    return ChildSpec(
        id=Atom(name),
        start=start,
        type=type_,
        shutdown_s=shutdown_s,
        modules=_modules(name),
        mfa=("ops.tree", "start", [Atom(name)]),
    )


def _modules(name: str) -> Sequence[str]:
    return [name]
