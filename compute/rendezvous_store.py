"""Where the ranks of one epoch find each other: a key-value store that rank 0 serves over TCP.

Anybody who can connect can read it: so it holds no secret. Its first key tells the epoch and
proves by a keyed hash that rank 0 is of the instance, so that nobody meets the ranks of another
one; the names of the other keys begin with another such hash.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed

from compute.collectives import Rendezvous
from compute.errors import JoinRefused, PeerLost

dist: Any = torch.distributed  # parts of it are not in its type information
_RETRY_S = 0.05
_EPOCH_KEY = "epoch"
_MAX_DIGITS = 20
# Torch says one of these of a peer that is silent; anything else is the connection's end.
_SILENT = ("Timed out", "timeout", "timed out")


def meet(
    rendezvous: Rendezvous, deadline_s: float, listener: socket.socket | None
) -> tuple[Any, str]:
    """Wait until all ranks of this epoch are here.

    Returns:
        ``(store, prefix)``: a torch store, and the prefix of this epoch's keys.

    Raises:
        JoinRefused: rank 0 is at a later epoch or cannot listen, a rank has come twice or sees
            another group.
        PeerLost: a rank did not come.
    """
    try:
        store = _open(rendezvous, deadline_s, listener)
        return store, _check_in(store, rendezvous, deadline_s)
    except RuntimeError as exc:  # torch's own: the store went away between two steps
        raise PeerLost(0, f"it left while joining: {reason(exc)}") from exc


def reason(exc: RuntimeError) -> str:
    """The useful part of what torch says."""
    text = str(exc).partition("\n")[0]
    text = text.rpartition("] ")[2] if text.startswith("[") and "] " in text else text
    text = text.partition(" This is typically")[0].partition(", keys:")[0]
    return f"silent: {text}" if any(word in str(exc) for word in _SILENT) else text


def _open(rendezvous: Rendezvous, deadline_s: float, listener: socket.socket | None) -> Any:
    """The key-value store that rank 0 serves at ``rendezvous.address`` for this epoch."""
    host, tcp_port = rendezvous.address
    mine = _proof(rendezvous, rendezvous.epoch)
    if rendezvous.rank == 0:
        if listener is None:
            listener = _listen(host, tcp_port)
        listener.setblocking(False)
        tcp_port = listener.getsockname()[1]
        served = dist.TCPStore(
            host,
            tcp_port,
            is_master=True,
            wait_for_workers=False,
            timeout=_left(deadline_s),
            master_listen_fd=listener.detach(),
        )
        served.set(_EPOCH_KEY, mine)
        return served
    pause = threading.Event()
    while True:
        theirs = ""
        try:
            store = dist.TCPStore(
                host,
                tcp_port,
                is_master=False,
                wait_for_workers=False,
                timeout=_left(deadline_s),
            )
            theirs = store.get(_EPOCH_KEY).decode(errors="replace")
        except RuntimeError as exc:
            if time.monotonic() >= deadline_s:
                raise PeerLost(0, f"it did not come to join: {reason(exc)}") from exc
        if theirs == mine:
            return store
        why = "it did not come to join"
        if theirs:
            epoch = _epoch(theirs, rendezvous)
            if epoch is None or epoch > rendezvous.epoch:
                where = "of another group" if epoch is None else f"at epoch {epoch}"
                raise JoinRefused(
                    f"rank 0 at {host}:{tcp_port} is {where}, "
                    f"rank {rendezvous.rank} at {rendezvous.generation}"
                )
            why = f"it is still at epoch {epoch}"
        if time.monotonic() >= deadline_s:
            raise PeerLost(0, why)
        pause.wait(_RETRY_S)  # the rank 0 of an epoch that is over has not gone yet


def _proof(rendezvous: Rendezvous, epoch: int) -> str:
    """What rank 0 publishes."""
    return f"{epoch}/{rendezvous.keyed('store', epoch)}"


def _epoch(theirs: str, rendezvous: Rendezvous) -> int | None:
    """At which epoch of this instance a rank 0 is; None where it is of another instance."""
    epoch = theirs.partition("/")[0]
    if not epoch.isdecimal() or len(epoch) > _MAX_DIGITS:
        return None
    return int(epoch) if theirs == _proof(rendezvous, int(epoch)) else None


def _check_in(store: Any, rendezvous: Rendezvous, deadline_s: float) -> str:
    """Wait until every rank has come once; the prefix of this epoch's keys."""
    prefix = rendezvous.keyed("keys")
    if store.add(f"{prefix}/times/{rendezvous.rank}", 1) > 1:
        raise JoinRefused(f"rank {rendezvous.rank} has joined {rendezvous.generation} already")
    mine = json.dumps({"hosts": rendezvous.hosts})
    keys = [f"{prefix}/rank/{rank}" for rank in range(rendezvous.world_size)]
    store.set(keys[rendezvous.rank], mine)
    for rank, key in enumerate(keys):
        try:
            store.wait([key], _left(deadline_s))
            theirs = store.get(key).decode()
        except RuntimeError as exc:
            lost = rank if time.monotonic() >= deadline_s else 0
            raise PeerLost(lost, f"it did not come to join: {reason(exc)}") from exc
        if theirs != mine:
            raise JoinRefused(
                f"rank {rank} at {rendezvous.generation} sees another group: {theirs}, not {mine}"
            )
    return prefix


def _listen(host: str, tcp_port: int) -> socket.socket:
    try:
        return socket.create_server((host, tcp_port), family=family(host))
    except OSError as exc:
        raise JoinRefused(f"rank 0 cannot listen on {host}:{tcp_port}: {exc}") from exc


def own_address(rendezvous: Rendezvous) -> str:
    """Numeric address of this machine on the way to rank 0; on rank 0 the one it is met at."""
    host, tcp_port = rendezvous.address
    if rendezvous.rank == 0:
        return host
    with socket.socket(family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, tcp_port))  # sends nothing
        return str(probe.getsockname()[0])


def interface_of(host: str) -> str:
    """Name of this machine's network interface with an address; empty where it has none."""
    numeric = host if ":" in host else socket.gethostbyname(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == numeric for a in addresses):
            return name
    return ""


def family(host: str) -> socket.AddressFamily:
    """Of a numeric address; names are looked up as IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _left(deadline_s: float) -> timedelta:
    return timedelta(seconds=max(0.001, deadline_s - time.monotonic()))
