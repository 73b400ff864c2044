"""What this machine has: memory, cores, devices. Read from the system, never guessed."""

from __future__ import annotations

import functools
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bridge.term import Atom, Term

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_MAX = Path("/sys/fs/cgroup/memory.max")


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
            Atom("devices"): [
                {
                    Atom("kind"): Atom(d.kind),
                    Atom("name"): d.name,
                    Atom("memory_bytes"): d.memory_bytes,
                }
                for d in self.devices
            ],
        }


def read_machine(limits: Limits) -> Machine:
    """Measure this machine now, within ``limits`` and those of its control group."""
    memory = psutil.virtual_memory()
    cgroup_bytes = _cgroup_limit_bytes()
    total_bytes = min(memory.total, cgroup_bytes or memory.total)
    limit_bytes = min(total_bytes, limits.max_memory_bytes or total_bytes)
    cores = min(_cores(), limits.max_cores or _cores())
    devices = [Device("cpu", _cpu_name(), total_bytes)]
    if limits.gpu is not False:
        devices += _gpus()
    return Machine(
        total_bytes=total_bytes,
        available_bytes=min(memory.available, total_bytes),
        limit_bytes=limit_bytes,
        cores=cores,
        devices=tuple(devices),
        has_mlx=_has_mlx(),
    )


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


def _cgroup_limit_bytes() -> int | None:
    """Memory limit of this control group (version 2); None without one."""
    try:
        return int(_CGROUP_MAX.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


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
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            Device(
                "cuda",
                _text(pynvml.nvmlDeviceGetName(handle)),
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        )
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
