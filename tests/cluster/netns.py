"""Several machines on one: network namespaces on a bridge, each with an address and a link to cut.

Needs root and ``ip`` of iproute2 on Linux; ``reason_for_none`` says what is missing. Everything
has this process's id in its name and is gone after the block, also what an earlier, killed
process left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PREFIX = "plx"  # interface names have 15 characters at most
_NAMES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000  # Linux, sched.h


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
    outer: str  # the other end of its link, at the bridge

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread opens in the block, and its children, are this machine's."""
        with Path("/proc/thread-self/ns/net").open() as before:
            with (_NAMES / self.namespace).open() as there:
                _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    def cut(self) -> None:
        """Nothing passes from now on; nobody is told."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def mend(self) -> None:
        """The link is there again."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        _ip(
            "-n", self.namespace, "addr", "replace", f"{self.address_v6}/64", "dev", "eth0", "nodad"
        )

    def shape(self, *, rate_mbit: int, delay_ms: int) -> None:
        """Limit and delay what it sends; the delay only where the kernel has ``netem``."""
        netem = ("netem", "delay", f"{delay_ms}ms", "rate", f"{rate_mbit}mbit", "limit", "20000")
        # 2 ms of it at once: a bucket is filled no finer than the timer ticks.
        burst = f"{max(64, 2 * rate_mbit)}kbit"
        bucket = ("tbf", "rate", f"{rate_mbit}mbit", "burst", burst, "latency", "50ms")
        if not self._queue(*netem) and not self._queue(*bucket):
            raise RuntimeError("the kernel has neither netem nor tbf")

    def _queue(self, *discipline: str) -> bool:
        command = ["tc", "qdisc", "replace", "dev", "eth0", "root", *discipline]
        run = subprocess.run([*self.prefix, *command], capture_output=True, timeout=10, check=False)
        return run.returncode == 0

    def pids(self) -> list[int]:
        """Processes that run on it."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self) -> None:
        """End all that runs on it at once, as a power cut does."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _enter(namespace: int) -> None:
    """Source: Linux, setns(2): the calling thread alone changes over."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def split(machines: Sequence[Machine]) -> None:
    """These hear each other and nobody else, whose links stay up all the same."""
    other = f"{_tag()}c"
    _ip("link", "add", other, "type", "bridge", "mcast_snooping", "0", check=False)
    _ip("link", "set", other, "up")
    for machine in machines:
        _ip("link", "set", machine.outer, "master", other)


def heal(machines: Sequence[Machine]) -> None:
    """Undo ``split``."""
    for machine in machines:
        _ip("link", "set", machine.outer, "master", f"{_tag()}b")


def _tag() -> str:
    return f"{PREFIX}{os.getpid()}"


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """``count`` machines on one bridge: 10.77.0.1 and fd77::1, and so on."""
    _remove_leftovers()
    tag = _tag()
    bridge = f"{tag}b"
    made = [
        Machine(f"{tag}n{i}", f"10.77.0.{i}", f"fd77::{i}", f"{tag}v{i}")
        for i in range(1, count + 1)
    ]
    try:
        # Without snooping: a bridge that forgets multicast groups would hide machines.
        _ip("link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
        _ip("link", "set", bridge, "up")
        for machine in made:
            _ip("netns", "add", machine.namespace)
            peer = ("peer", "name", "eth0", "netns", machine.namespace)
            _ip("link", "add", machine.outer, "type", "veth", *peer)
            _ip("link", "set", machine.outer, "master", bridge, "up")
            inside = ("-n", machine.namespace)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            machine.mend()
        yield made
    finally:
        for machine in made:
            _ip("netns", "del", machine.namespace, check=False)
        for name in (bridge, f"{tag}c"):
            _ip("link", "del", name, check=False)


def _remove_leftovers() -> None:
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, timeout=10, check=True)
    for name, pid in re.findall(rf"^({PREFIX}(\d+)\w*)", listed.stdout, re.MULTILINE):
        if not psutil.pid_exists(int(pid)):
            _ip("netns", "del", name, check=False)
            for end in "bc":
                _ip("link", "del", f"{PREFIX}{pid}{end}", check=False)


def _ip(*args: str, check: bool = True) -> int:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=10, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    return done.returncode
