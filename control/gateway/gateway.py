"""What every route of one gateway shares."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from control.backend import Backend, ClusterControl
from control.gateway.key_ring import KeyRing
from control.gateway.metrics import Metrics
from control.gateway.response_store import ResponseStore
from control.gateway.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class Gateway:
    """The cluster behind the routes, and the routes' own settings and counters.

    Attributes:
        cluster: what the ``/cluster`` routes steer; None where no cluster is attached.
        ring: whom the routes let in.
        responses: kept for the clients that go on with them.
        stopping: set when the server drains; feeds without an end of their own then end.
    """

    backend: Backend
    cluster: ClusterControl | None
    settings: GatewaySettings
    metrics: Metrics
    ring: KeyRing = field(default_factory=KeyRing)
    responses: ResponseStore = field(default_factory=ResponseStore)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
