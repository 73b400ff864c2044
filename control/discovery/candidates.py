"""A node that was seen somewhere: what is known of it, and whether it may be joined. Pure.

A node announces a proof that it knows the cluster's secret: an HMAC, keyed by the cookie, over
what it says of itself and a nonce of its start. Nobody learns the cookie from it, and a node with
another one is seen and named, never dialled.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

SERVICE_TYPE: Final = "_phalanx._tcp.local."
FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 5.0
REFUSED_RETRY_S: Final = 30.0


class Address(NamedTuple):
    """Where a node's distribution listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who we are to other nodes. ``cookie`` is the secret, never shown or sent."""

    node: str
    cluster: str
    version: str
    cookie: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that was seen.

    Attributes:
        node: its name; where that is not known, the place it was looked for.
        source: the strategy that saw it.
        refused: why it may not be joined; empty where it may.
        version: its software, if it said.
    """

    node: str
    addresses: tuple[Address, ...]
    source: str
    refused: str = ""
    version: str = ""


def proof(cookie: str, node: str, cluster: str, port: int, nonce: str) -> str:
    """64 hexadecimal digits that only a holder of ``cookie`` can make."""
    text = "\0".join(("phalanx", node, cluster, str(port), nonce))
    return hmac.new(cookie.encode(), text.encode(), hashlib.sha256).hexdigest()


def service_name(identity: Identity) -> str:
    """The instance name of a node's announcement: short, and the same at every start."""
    digest = hashlib.sha256(f"{identity.node}\0{identity.cluster}".encode()).hexdigest()[:12]
    return f"{identity.node.partition('@')[0][:40]}-{digest}.{SERVICE_TYPE}"


def service_text(identity: Identity, port: int, nonce: str) -> dict[str, str]:
    """The TXT record of a node whose distribution listens on ``port``."""
    return {
        "node": identity.node,
        "cluster": identity.cluster,
        "version": identity.version,
        "nonce": nonce,
        "proof": proof(identity.cookie, identity.node, identity.cluster, port, nonce),
    }


def candidate_of_service(
    identity: Identity, text: Mapping[bytes, bytes | None], hosts: Sequence[str], port: int
) -> Candidate | None:
    """Whom an announcement is of; None for our own and for what is not one of ours."""
    said = {
        key.decode("utf-8", "replace"): (value or b"").decode("utf-8", "replace")
        for key, value in text.items()
    }
    node, cluster = said.get("node", ""), said.get("cluster", "")
    if node == identity.node or "@" not in node:
        return None
    wanted = proof(identity.cookie, node, cluster, port, said.get("nonce", ""))
    refused = ""
    if cluster != identity.cluster:
        refused = (
            f"it is of the cluster {cluster!r}, this node of {identity.cluster!r}: give both the "
            f"same cluster_name to join them"
        )
    elif not hmac.compare_digest(wanted.encode(), said.get("proof", "").encode()):
        refused = (
            "it has another secret: copy the file `cookie` of one home to the other to join them"
        )
    return Candidate(
        node=node,
        addresses=tuple(Address(host, port) for host in hosts),
        source="zeroconf",
        refused=refused,
        version=said.get("version", ""),
    )


def retry_s(num_failed: int, chance: float) -> float:
    """Seconds until the next attempt: doubled each time, spread by ``chance`` in [0, 1)."""
    full_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(num_failed, 16))
    return full_s * (0.5 + 0.5 * chance)


def parse_peer(text: str) -> tuple[str, int | None]:
    """``host``, ``host:port``, ``[v6]`` or ``[v6]:port``. Raises ValueError."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        ipaddress.IPv6Address(host)
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r} is not [ADDRESS] or [ADDRESS]:PORT")
        port = rest[1:]
    elif text.count(":") > 1:
        ipaddress.IPv6Address(text)
        return text, None
    else:
        host, _, port = text.partition(":")
        if ":" in text and not port:
            raise ValueError(f"{text!r} has no port after its colon")
    if not host:
        raise ValueError(f"{text!r} names no host")
    if not port:
        return host, None
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{text!r}: {port} is no port from 1 to 65535")
    return host, int(port)
