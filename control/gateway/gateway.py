"""What every route of one gateway shares."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from control.backend import Backend, ClusterControl
from control.gateway.metrics import Metrics
from control.gateway.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class Gateway:
    """The cluster behind the routes, and the routes' own settings and counters.

    Attributes:
        cluster: what the ``/cluster`` routes steer; None where no cluster is attached.
        stopping: set when the server drains; feeds without an end of their own then end.
    """

    backend: Backend
    cluster: ClusterControl | None
    settings: GatewaySettings
    metrics: Metrics
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
