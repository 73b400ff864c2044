"""Several machines on one: network namespaces on a bridge, each with an address and a link to cut.

Needs root and ``ip`` of iproute2 on Linux; ``reason_for_none`` says what is missing. Everything
has this process's id in its name and is gone after the block, also what an earlier, killed
process left.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

PREFIX = "plx"  # interface names have 15 characters at most


def reason_for_none() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (iproute2)"
    name = f"{PREFIX}{os.getpid()}t"
    if _ip("netns", "add", name, check=False):
        return "the kernel gives no network namespaces here"
    _ip("netns", "del", name, check=False)
    return ""


@dataclass(frozen=True, slots=True)
class Machine:
    """One namespace. Commands run in it with ``prefix`` before them."""

    namespace: str
    address: str
    address_v6: str

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]

    def cut(self) -> None:
        """Nothing passes from now on; nobody is told."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def mend(self) -> None:
        """The link is there again."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        _ip(
            "-n", self.namespace, "addr", "replace", f"{self.address_v6}/64", "dev", "eth0", "nodad"
        )

    def shape(self, *netem: str) -> None:
        """Delay or limit what it sends: arguments of ``tc qdisc ... netem``."""
        command = ["tc", "qdisc", "replace", "dev", "eth0", "root", "netem", *netem]
        subprocess.run([*self.prefix, *command], check=True, timeout=10)


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """``count`` machines on one bridge: 10.77.0.1 and fd77::1, and so on."""
    _remove_leftovers()
    tag = f"{PREFIX}{os.getpid()}"
    bridge = f"{tag}b"
    made = [Machine(f"{tag}n{i}", f"10.77.0.{i}", f"fd77::{i}") for i in range(1, count + 1)]
    try:
        # Without snooping: a bridge that forgets multicast groups would hide machines.
        _ip("link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
        _ip("link", "set", bridge, "up")
        for i, machine in enumerate(made, 1):
            _ip("netns", "add", machine.namespace)
            ours = f"{tag}v{i}"
            peer = ("peer", "name", "eth0", "netns", machine.namespace)
            _ip("link", "add", ours, "type", "veth", *peer)
            _ip("link", "set", ours, "master", bridge, "up")
            inside = ("-n", machine.namespace)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            machine.mend()
        yield made
    finally:
        for machine in made:
            _ip("netns", "del", machine.namespace, check=False)
        _ip("link", "del", bridge, check=False)


def _remove_leftovers() -> None:
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, timeout=10, check=True)
    for name, pid in re.findall(rf"^({PREFIX}(\d+)\w*)", listed.stdout, re.MULTILINE):
        if not psutil.pid_exists(int(pid)):
            _ip("netns", "del", name, check=False)
            _ip("link", "del", f"{PREFIX}{pid}b", check=False)


def _ip(*args: str, check: bool = True) -> int:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=10, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    return done.returncode
