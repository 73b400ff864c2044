"""From settings and configuration to the parts of a node's tree: every effect is made here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from bridge.node import Node
from bridge.tls import TlsFiles
from control.cluster_api import ClusterApi
from control.gateway.process import BoundAddress
from control.gateway.server import ServerTls
from control.gateway.settings import GatewaySettings
from control.machine import Limits
from control.model_store import ModelStore
from control.placement_request import Defaults
from control.rank import RankLimits
from models.card import load_cards
from ops.config import Config, Role
from ops.home import Home
from ops.joining import configured_machines, make_joining, own_host_names
from ops.port_starter import PortStarter
from ops.start_settings import StartSettings
from ops.tree import Parts

# A model's own context can be 128k and more; its KV cache for every slot would fill the machine.
DEFAULT_CONTEXT_TOKENS = 8192


def make_parts(
    node: Node,
    settings: StartSettings,
    config: Config,
    home: Home,
    tls: TlsFiles | None,
    hosts: Sequence[str],
    *,
    http_tls: ServerTls | None = None,
    stop: Callable[[bool], None],
) -> Parts:
    """All parts of this node's tree.

    Args:
        hosts: addresses that its distribution listens on.
        http_tls: with what its HTTP endpoint speaks TLS, if it does.
    """
    names = own_host_names() | {settings.node.partition("@")[2].lower()}
    device = next((d for d in config.devices if d.hostname.lower() in names), None)
    machines, tie_breaker = configured_machines(settings.node, config)
    roles = device.roles if device else frozenset(Role)
    limits = Limits(
        max_memory_bytes=device.max_memory_bytes if device else None,
        max_cores=device.max_cores if device else None,
        gpu=device.gpu if device else None,
    )
    joining = make_joining(node, settings, config, home.cookie(), hosts, tls)
    cards = load_cards(config.models.cards)
    store = ModelStore(
        config.models.dir or home.models_dir, cards, quota_bytes=config.models.quota_bytes
    )
    return Parts(
        api=ClusterApi(node, config.cluster_name),
        store=store,
        address=BoundAddress(settings.http_host, settings.http_port, http_tls),
        start_port=PortStarter(
            control_node=settings.node,
            cookie=home.cookie(),
            epmd_port=settings.epmd_port,
            logs_dir=home.logs_dir,
            cache_dir=config.engine.kernel_cache or home.cache_dir,
            tls=tls,
        ),
        stop=stop,
        state_dir=home.state_dir,
        roles=tuple(sorted(str(r) for r in roles)),
        machine_limits=limits,
        identity=joining.identity,
        addresses=joining.addresses,
        strategies=joining.strategies,
        machines=machines,
        tie_breaker=tie_breaker,
        defaults=Defaults(
            context_tokens=config.engine.context_tokens or DEFAULT_CONTEXT_TOKENS,
            num_slots=config.engine.num_slots,
            threads=config.engine.threads or 0,
            device=config.engine.device or "",
        ),
        rank_limits=RankLimits(),
        autoload=config.models.autoload,
        num_spares=config.engine.spare_ports,
        port_prefix=f"{settings.node.partition('@')[0]}_port_{os.getpid()}_{int(time.time())}",
        drain_s=config.limits.drain_timeout_s,
        gateway=GatewaySettings(
            max_body_bytes=config.limits.max_body_bytes,
            receive_timeout_s=config.limits.receive_timeout_s,
            cors_origins=config.http.cors_origins,
            open_timeout_s=config.limits.open_timeout_s,
            write_timeout_s=config.limits.write_timeout_s,
        ),
        insecure=settings.insecure,
    )
