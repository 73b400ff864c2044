"""What this machine has: memory, cores, devices. Read from the system, never guessed."""

from __future__ import annotations

import functools
import importlib.util
import logging
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from bridge.term import Atom, Term
from bridge.text import text_of

log = logging.getLogger("control.machine")

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_OF = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Device:
    """A place a rank can run on."""

    kind: str  # cpu, cuda, metal
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the configuration lends to the cluster; None: all of it."""

    max_memory_bytes: int | None = None
    max_cores: int | None = None
    gpu: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One reading. ``has_mlx``: MLX is installed, whatever devices there are."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int
    cores: int
    devices: tuple[Device, ...]
    has_mlx: bool = False

    def to_term(self) -> dict[Any, Term]:
        """The ``memory``, ``cores`` and ``devices`` of CONTRACT section 3."""
        return {
            Atom("memory"): {
                Atom("total_bytes"): self.total_bytes,
                Atom("available_bytes"): self.available_bytes,
                Atom("limit_bytes"): self.limit_bytes,
            },
            Atom("cores"): self.cores,
            Atom("has_mlx"): self.has_mlx,
            Atom("devices"): [
                {
                    Atom("kind"): Atom(d.kind),
                    Atom("name"): d.name,
                    Atom("memory_bytes"): d.memory_bytes,
                }
                for d in self.devices
            ],
        }


def machine_of(term: Mapping[Any, Any]) -> Machine:
    """Read what ``Machine.to_term`` gave, also of another node. Raises KeyError, TypeError."""
    memory = term["memory"]
    return Machine(
        total_bytes=int(memory["total_bytes"]),
        available_bytes=int(memory["available_bytes"]),
        limit_bytes=int(memory["limit_bytes"]),
        cores=int(term["cores"]),
        devices=tuple(
            Device(str(d["kind"]), text_of(d["name"]), int(d["memory_bytes"]))
            for d in term["devices"]
        ),
        has_mlx=bool(term["has_mlx"]),
    )


def differs(a: Machine, b: Machine) -> bool:
    """Whether others should hear of ``b`` who know ``a``: free memory matters by the 64th."""
    step_bytes = max(1, a.total_bytes // 64)
    moved_bytes = abs(a.available_bytes - b.available_bytes)
    return moved_bytes >= step_bytes or replace(a, available_bytes=b.available_bytes) != b


def read_machine(limits: Limits) -> Machine:
    """Measure this machine now, within ``limits`` and those of its control group."""
    memory = psutil.virtual_memory()
    cgroup = cgroup_memory()
    total_bytes = min(memory.total, cgroup.limit_bytes if cgroup else memory.total)
    available_bytes = memory.available
    if cgroup is not None:
        available_bytes = min(available_bytes, max(0, cgroup.limit_bytes - cgroup.used_bytes))
    limit_bytes = min(total_bytes, limits.max_memory_bytes or total_bytes)
    cores = min(_cores(), limits.max_cores or _cores())
    devices = [Device("cpu", _cpu_name(), total_bytes)]
    if limits.gpu is not False:
        devices += _gpus()
    return Machine(
        total_bytes=total_bytes,
        available_bytes=min(available_bytes, total_bytes),
        limit_bytes=limit_bytes,
        cores=cores,
        devices=tuple(devices),
        has_mlx=_has_mlx(),
    )


def is_busy() -> bool:
    """Whether every core had something to do for the last minute."""
    return psutil.getloadavg()[0] >= _cores()


def _cores() -> int:
    """Cores this process may run on."""
    try:
        return len(psutil.Process().cpu_affinity() or ()) or psutil.cpu_count() or 1
    except AttributeError:  # macOS has no affinity
        return psutil.cpu_count() or 1


@functools.cache
def _has_mlx() -> bool:
    """Looked for, not imported: no tensor library belongs in the control process."""
    return importlib.util.find_spec("mlx") is not None


@functools.cache
def _cpu_name() -> str:
    try:
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest memory limit of the control groups this process is in, and its use."""

    limit_bytes: int
    used_bytes: int


def cgroup_memory(root: Path = _CGROUP, membership: Path = _CGROUP_OF) -> CgroupMemory | None:
    """Limits of versions 1 and 2, of this process's group and all above; None without one.

    Args:
        root: where the control groups are mounted.
        membership: says which groups this process is in.

    Source: Linux, admin-guide/cgroup-v2.rst "Memory Interface Files", cgroup-v1/memory.rst.
    """
    found: list[CgroupMemory] = []
    for top, path, limit, used in _cgroup_places(root, membership):
        while True:
            read = _read_cgroup(path / limit, path / used)
            if read is not None:
                found.append(read)
            if path == top:
                break
            path = path.parent
    return min(found, key=lambda one: one.limit_bytes - one.used_bytes, default=None)


def _cgroup_places(root: Path, membership: Path) -> list[tuple[Path, Path, str, str]]:
    """``(hierarchy, group, file of the limit, file of the use)``: what the group is, and, in
    a container that shows its own group as the top, the top.
    """
    files = {True: ("memory.max", "memory.current")}
    files[False] = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    places = [(root, root, *files[True]), (root / "memory", root / "memory", *files[False])]
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root if not controllers else root / "memory"
        group = top / path.lstrip("/")
        if group.is_dir() and ".." not in group.parts:
            places.append((top, group, *files[not controllers]))
    return places


def _read_cgroup(limit: Path, used: Path) -> CgroupMemory | None:
    try:
        limit_bytes = int(limit.read_text())
        # Version 1 has no word for "none": it writes the largest number of pages.
        if limit_bytes >= 2**60:
            return None
        used_bytes = int(used.read_text()) - _cache_bytes(used.parent / "memory.stat")
        return CgroupMemory(limit_bytes, max(0, used_bytes))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cache_bytes(stat: Path) -> int:
    """What a group holds of files: given back when it is needed."""
    names = ("inactive_file", "active_file")
    try:
        pairs = [line.split() for line in stat.read_text().splitlines()]
        sizes = {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return 0
    prefix = "total_" if "total_inactive_file" in sizes else ""  # version 1: with groups below
    return sum(sizes.get(prefix + name, 0) for name in names)


@functools.cache
def _gpus() -> tuple[Device, ...]:
    """CUDA devices as NVML sees them, and Apple's GPU, which shares the machine's memory."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return (Device("metal", _cpu_name(), psutil.virtual_memory().total),)
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: no CUDA device
        return ()
    found: list[Device] = []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        for handle in handles:
            name = _text(pynvml.nvmlDeviceGetName(handle))
            found.append(Device("cuda", name, int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)))
    except pynvml.NVMLError as exc:  # one that shares the machine's memory does not say how much
        log.warning("a GPU does not say what it has (%s); %d are used", exc, len(found))
    finally:
        pynvml.nvmlShutdown()
    return tuple(found)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
