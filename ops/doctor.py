"""What `ctl doctor` looks at on this machine, and what it says of it: one finding a line.

A finding is ``good``, ``note`` (nothing is broken) or ``bad`` (something will not work; the text
ends with what to do). The node of the home is asked what it sees; where none runs, the local
network is listened to for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import shutil
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.filesize import decimal

from bridge import epmd, gen_server
from bridge.errors import EpmdError
from bridge.term import Atom
from control.discovery.addresses import (
    Interface,
    is_loopback,
    listen_hosts,
    parse_ip,
    read_interfaces,
    resolve,
)
from control.discovery.candidates import Candidate, Identity
from control.json_view import to_json
from control.machine import Limits, Machine, read_machine
from control.members import LEFT
from ops.client import ClusterClient, Target, run
from ops.config import Config
from ops.errors import NoNode, Refused
from ops.home import Home, RunInfo
from ops.joining import software_version

LOW_MEMORY_BYTES: Final = 2**30
LOW_DISK_BYTES: Final = 2 * 2**30
MAX_SKEW_S: Final = 5.0
LISTEN_S: Final = 3.0
ASK_S: Final = 5.0
MULTICAST_S: Final = 1.0
_GROUP: Final = "224.0.0.251"  # of multicast DNS; our own port, so that nobody else is disturbed
_BUILT: Final = 2026  # a clock before this year was never set


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``state`` is good, note or bad."""

    what: str
    state: str
    text: str


def examine(home: Home, config: Config) -> list[Finding]:
    """Everything, in the order of cause and effect."""
    info = home.read_run()
    name = info.node if info else config.node.name
    host = name.partition("@")[2]
    interfaces = read_interfaces()
    found = [_node(home, info), *_machine(read_machine(Limits())), _disk(home), _clock(time.time())]
    found += [*_ports(config, info), *asyncio.run(_epmd(config, info, host))]
    found.append(address(host, interfaces))
    if not is_loopback(host):
        found += _multicast(listen_hosts(host, interfaces))
    if info is not None:
        found += _told_by_node(home)
    elif config.network.discovery == "auto" and not is_loopback(host) and home.cookie_file.exists():
        identity = Identity(
            node=f"doctor@{host}",
            cluster=config.cluster_name,
            version=software_version(),
            cookie=home.cookie(),
        )
        found += others([_as_seen(c) for c in asyncio.run(_listen(identity, host, interfaces))])
    return found


def _node(home: Home, info: RunInfo | None) -> Finding:
    if info is None:
        text = f"none runs on {home.root}; start one with `ctl start --home {home.root}`"
        return Finding("node", "note", text)
    return Finding("node", "good", f"{info.node} runs as process {info.os_pid}, {info.url}")


# -- this machine --------------------------------------------------------------------------


def _machine(machine: Machine) -> list[Finding]:
    memory = f"{decimal(machine.available_bytes)} free of {decimal(machine.total_bytes)}"
    low = machine.available_bytes < LOW_MEMORY_BYTES
    advice = f"; models need more: end other programs (under {decimal(LOW_MEMORY_BYTES)} is little)"
    found = [Finding("memory", "bad" if low else "good", memory + (advice if low else ""))]
    devices = ", ".join(f"{d.kind} {d.name} ({decimal(d.memory_bytes)})" for d in machine.devices)
    found.append(Finding("devices", "good", f"{machine.cores} cores; {devices}"))
    if Path("/dev/nvidia0").exists() and not any(d.kind == "cuda" for d in machine.devices):
        text = "there is /dev/nvidia0, but NVML finds no GPU: install the driver's user libraries"
        found.append(Finding("gpu", "bad", text))
    return found


def _disk(home: Home) -> Finding:
    place = home.root if home.root.exists() else Path.home()
    free_bytes = shutil.disk_usage(place).free
    text = f"{decimal(free_bytes)} free under {place}"
    if free_bytes < LOW_DISK_BYTES:
        return Finding("disk", "bad", f"{text}; model files need more: free some, or use --home")
    return Finding("disk", "good", text)


def _clock(now_s: float) -> Finding:
    now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    text = now.strftime("%Y-%m-%d %H:%M:%S UTC")
    if now.year < _BUILT:
        return Finding("clock", "bad", f"{text}: it was never set; certificates will not hold")
    return Finding("clock", "good", text)


def address(host: str, interfaces: Sequence[Interface]) -> Finding:
    """Whether other machines can reach a node of this ``host``."""
    if is_loopback(host):
        text = f"{host}: this machine alone; to join others use `ctl start --name NAME@ADDRESS`"
        return Finding("address", "note", text)
    ours = {one.address for one in interfaces}
    named = [host] if parse_ip(host) is not None else resolve(host)
    if not named:
        text = f"{host} is not known here: use an address in --name, or add it to /etc/hosts"
        return Finding("address", "bad", text)
    if all(is_loopback(one) for one in named):
        text = f"{host} means {', '.join(named)} here, this machine alone: correct /etc/hosts"
        return Finding("address", "bad", text)
    if not ours.intersection(named):
        here = ", ".join(sorted(a for a in ours if not is_loopback(a))) or "none"
        text = f"{host} is no address of this machine; its links that are up have: {here}"
        return Finding("address", "bad", text)
    return Finding("address", "good", f"listens on {', '.join(listen_hosts(host, interfaces))}")


def _ports(config: Config, info: RunInfo | None) -> list[Finding]:
    if info is not None:
        where = f"http {info.url}, distribution {info.dist_port}, EPMD {info.epmd_port}"
        return [Finding("ports", "good", where)]
    wanted = {"http": (config.http.host, config.http.port)}
    if config.node.dist_port:
        wanted["distribution"] = (config.node.name.partition("@")[2], config.node.dist_port)
    found = []
    for what, (host, port) in wanted.items():
        taken = port and _is_taken(host, port)
        text = f"{what} {host}:{port} " + (
            f"is taken by another program: end it, or set another port ({what})"
            if taken
            else "is free"
        )
        found.append(Finding("ports", "bad" if taken else "good", text))
    return found


def _is_taken(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


async def _epmd(config: Config, info: RunInfo | None, host: str) -> list[Finding]:
    port = info.epmd_port if info else config.node.epmd_port
    try:
        names = [name for name, _ in await epmd.names("127.0.0.1", port, timeout_s=2.0)]
    except EpmdError as exc:
        if info is None:
            return [Finding("epmd", "good", f"none at {port}; a node brings its own")]
        return [Finding("epmd", "bad", f"{exc}: restart the node")]
    found = [Finding("epmd", "good", f"port {port} knows {', '.join(names) or 'nobody'}")]
    if not is_loopback(host):
        try:
            await epmd.names(host, port, timeout_s=2.0)
        except EpmdError:
            text = (
                f"it answers this machine alone, not at {host}: peers must join by HOST:PORT. "
                f"Stop the node that brought it first, or start `epmd` by the system"
            )
            found.append(Finding("epmd", "note", text))
    return found


def _multicast(hosts: Sequence[str]) -> list[Finding]:
    found = []
    for host in hosts:
        if ":" in host or parse_ip(host) is None:
            continue
        if multicast_works(host):
            found.append(Finding("multicast", "good", f"works at {host}"))
        else:
            text = (
                f"does not work at {host}: let UDP port 5353 pass the firewall, or use "
                f"network.discovery: static with peers"
            )
            found.append(Finding("multicast", "bad", text))
    return found


def multicast_works(host: str) -> bool:
    """Whether what is sent to the group from ``host`` is heard there."""
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heard,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sent,
    ):
        heard.bind(("", 0))
        heard.settimeout(MULTICAST_S)
        member = struct.pack("4s4s", socket.inet_aton(_GROUP), socket.inet_aton(host))
        heard.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        sent.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host))
        sent.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        sent.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
        sent.sendto(b"phalanx doctor", (_GROUP, heard.getsockname()[1]))
        return heard.recv(64) == b"phalanx doctor"
    return False


# -- other machines ------------------------------------------------------------------------


async def _listen(
    identity: Identity, host: str, interfaces: Sequence[Interface]
) -> list[Candidate]:
    from control.discovery.zeroconf_strategy import ZeroconfStrategy  # not for every `ctl`

    strategy = ZeroconfStrategy(
        identity, hosts=listen_hosts(host, interfaces), port=0, interfaces=lambda: interfaces
    )
    try:
        await strategy.look()
        await asyncio.sleep(LISTEN_S)
        return list(await strategy.look())
    except OSError:
        return []  # what is wrong with multicast has been said
    finally:
        await strategy.stop()


def _as_seen(candidate: Candidate) -> dict[str, Any]:
    return {
        "node": candidate.node,
        "state": "refused" if candidate.refused else "seen",
        "why": candidate.refused,
        "addresses": [str(one) for one in candidate.addresses],
    }


def _told_by_node(home: Home) -> list[Finding]:
    async def body(client: ClusterClient) -> tuple[Any, Any]:
        with client.node.open_process(label="doctor") as me:
            seen = await gen_server.call(
                me, ("discovery", client.name), Atom("seen"), timeout_s=ASK_S
            )
            return seen, await client.call(Atom("nodes"), timeout_s=ASK_S)

    try:
        seen, nodes = run(Target(home), body)
    except (NoNode, Refused, gen_server.CallError) as exc:
        return [Finding("node", "bad", f"it does not answer: {exc}; see its log")]
    return [*members(to_json(nodes)), *others(to_json(seen))]


def members(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What is said of the machines that the cluster knows."""
    up = [row["name"] for row in rows if row["state"] == "up"]
    found = [Finding("cluster", "good", f"{len(up)} up: {', '.join(up)}")]
    for row in rows:
        skew_s = float(row.get("clock_ahead_s") or 0.0)
        if row["state"] == "down":
            text = f"{row['name']} is down: {row.get('why')}"
            left = row.get("why") == LEFT
            found.append(Finding("cluster", "note" if left else "bad", text))
        if row.get("note"):
            found.append(Finding("version", "note", f"{row['name']}: {row['note']}"))
        if abs(skew_s) > MAX_SKEW_S:
            side = "ahead" if skew_s > 0 else "behind"
            text = f"that of {row['name']} is {abs(skew_s):.0f} s {side}: set both by NTP"
            found.append(Finding("clock", "bad", text))
    return found


def others(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What is said of nodes that were seen and are not joined."""
    found = []
    for row in rows:
        where = ", ".join(row.get("addresses") or []) or "no address"
        if row["state"] == "joined":
            continue
        if row["state"] == "refused":
            # Somebody else's cluster beside ours is no fault.
            state = "note" if "of the cluster" in row["why"] else "bad"
            text = f"{row['node']} ({where}) is not joined: {row['why']}"
        elif row["state"] == "trying":
            state, text = "bad", f"{row['node']} is seen and cannot be reached: {row['why']}"
            text += "; let its port pass the firewall"
        else:
            state, text = "good", f"{row['node']} ({where}) is there and may be joined"
        found.append(Finding("seen", state, text))
    return found
