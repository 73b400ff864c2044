"""A node of a cluster inside the test's process: real connections, `events`, `membership` and,
where asked for, `discovery`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from control.discovery.addresses import read_interfaces
from control.discovery.candidates import Address, Identity
from control.discovery.server import Discovery
from control.discovery.static_strategy import StaticStrategy
from control.discovery.strategy import Strategy
from control.events import Events
from control.machine import Device, Machine
from control.meeting import reaches_of
from control.membership import Membership
from control.membership_rule import Limits

GIB = 2**30
MACHINE = Machine(
    total_bytes=8 * GIB,
    available_bytes=4 * GIB,
    limit_bytes=8 * GIB,
    cores=4,
    devices=(Device("cpu", "a cpu", 8 * GIB),),
)
FAST = Limits(beat_s=0.1, silence_s=0.6, check_s=0.05)


class ClusterNode:
    """Made by ``cluster_node``."""

    def __init__(self, node: Node, identity: Identity) -> None:
        self.node, self.identity = node, identity
        self.machine = MACHINE
        self.membership: Pid | None = None

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def address(self) -> Address:
        assert self.node.address is not None
        return Address(*self.node.address)

    def addresses(self) -> tuple[Address, ...]:
        return (self.address,)

    async def call(self, name: str, request: Term) -> Any:
        return await gen_server.node_call(self.node, Atom(name), request)

    async def rows(self) -> dict[str, dict[str, Any]]:
        return {str(row["name"]): row for row in await self.call("membership", Atom("nodes"))}

    async def states(self) -> dict[str, str]:
        return {name: str(row["state"]) for name, row in (await self.rows()).items()}

    async def discover(self, strategies: Sequence[Strategy]) -> None:
        await gen_server.start(
            self.node, Discovery(strategies, interfaces=read_interfaces), name="discovery"
        )

    def static(self, *peers: str, epmd_port: int = 1) -> StaticStrategy:
        return StaticStrategy(peers, self.identity, connected=self.node.nodes, epmd_port=epmd_port)

    @contextlib.asynccontextmanager
    async def subscribed(self) -> AsyncIterator[Process]:
        """A process that gets ``{node_up, N}`` and ``{node_down, N}``."""
        with self.node.open_process(label="subscriber") as me:
            await gen_server.call(me, Atom("membership"), (Atom("subscribe"), me.pid))
            yield me


@contextlib.asynccontextmanager
async def cluster_node(
    short_name: str,
    *,
    cookie: str = "SECRET",
    cluster: str = "lab",
    version: str = "1",
    limits: Limits = FAST,
    epmd: Epmd | None = None,
    with_membership: bool = True,
) -> AsyncIterator[ClusterNode]:
    """A node that has started, and is stopped after the block."""
    name = f"{short_name}@127.0.0.1"
    node = Node(name, cookie)
    identity = Identity(node=name, cluster=cluster, version=version, cookie=cookie)
    await node.start(listen=("127.0.0.1", 0), epmd=epmd)
    made = ClusterNode(node, identity)
    try:
        if with_membership:
            await gen_server.start(node, Events(), name="events")
            server = Membership(
                lambda: made.machine,
                ("compute",),
                identity=identity,
                addresses=made.addresses,
                reaches=lambda: reaches_of(["127.0.0.1"], []),
                limits=limits,
            )
            made.membership = await gen_server.start(node, server, name="membership")
        yield made
    finally:
        discovery = node.whereis("discovery")
        if discovery is not None:
            with node.open_process(label="end") as me:
                monitor = me.monitor(discovery)
                me.exit(discovery, Atom("shutdown"))
                await me.receive(lambda m: m if m[:2] == ("DOWN", monitor) else None, timeout_s=5)
        await node.stop()


async def connect(a: ClusterNode, b: ClusterNode) -> None:
    assert await a.node.connect(b.name, address=(b.address.host, b.address.port))
