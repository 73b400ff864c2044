"""How the GPUs of one machine are linked, as the driver says: the machine's link to itself.

Only ranks could measure it, by a copy from one GPU to another; until one does, the figures are
those of the hardware less what protocols usually take.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

from control.topology import Kind, Link

log = logging.getLogger("control.gpu_links")

# Bytes a second of one PCIe lane and direction, by generation. Source: PCI-SIG.
_LANE: Final = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
_EFFICIENCY: Final = 0.8
_NVLINK_S: Final = 3e-6
_PCIE_S: Final = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two GPUs as NVML describes them.

    Attributes:
        nvlinks: between them, or from each to a switch; nvlink_mbps: bytes a second of one, in
            millions.
        switched: the links go to a switch.
        pcie_lanes, pcie_generation: of the narrower one's slot.
    """

    nvlinks: int = 0
    nvlink_mbps: int = 0
    switched: bool = False
    pcie_lanes: int = 16
    pcie_generation: int = 3


def link_of(pair: Pair) -> Link:
    """NVLink where there is one, else the way through PCIe."""
    if pair.nvlinks and pair.nvlink_mbps:
        kind = Kind.NVSWITCH if pair.switched else Kind.NVLINK
        return Link(kind, _NVLINK_S, _EFFICIENCY * 1e6 * pair.nvlinks * pair.nvlink_mbps)
    lane = _LANE.get(pair.pcie_generation, max(_LANE.values()))
    kind = Kind.PCIE_X16 if pair.pcie_lanes >= 16 else Kind.PCIE_X8
    return Link(kind, _PCIE_S, _EFFICIENCY * lane * max(1, pair.pcie_lanes))


def slowest(pairs: Iterable[Pair]) -> Link | None:
    """A group of GPUs waits for its worst pair; None without any."""
    return min(map(link_of, pairs), key=lambda link: link.bytes_per_s, default=None)


def gpu_link() -> Link | None:
    """Of this machine's GPUs; None where it has less than two, or the driver does not say."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: no CUDA device
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return slowest(_pair(pynvml, a, b) for a, b in combinations(handles, 2))
    except pynvml.NVMLError as exc:
        log.info("the links between GPUs are not known: %s", exc)
        return None
    finally:
        pynvml.nvmlShutdown()


def _pair(nvml: Any, a: Any, b: Any) -> Pair:
    linked = nvml.nvmlDeviceGetP2PStatus(a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    links = _nvlinks(nvml, a, b) if linked == nvml.NVML_P2P_STATUS_OK else []
    return Pair(
        nvlinks=len(links),
        nvlink_mbps=_nvlink_mbps(nvml, a) if links else 0,
        switched=any(links),
        pcie_lanes=min(nvml.nvmlDeviceGetMaxPcieLinkWidth(gpu) for gpu in (a, b)),
        pcie_generation=min(nvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu) for gpu in (a, b)),
    )


def _nvlinks(nvml: Any, a: Any, b: Any) -> list[bool]:
    """Each active link from ``a`` that leads to ``b`` or to a switch; whether to a switch."""
    found = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(a, link) != nvml.NVML_FEATURE_ENABLED:
                continue
            to_switch = (
                nvml.nvmlDeviceGetNvLinkRemoteDeviceType(a, link)
                == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
            )
            remote = nvml.nvmlDeviceGetNvLinkRemotePciInfo(a, link).busId
            if to_switch or remote == nvml.nvmlDeviceGetPciInfo(b).busId:
                found.append(to_switch)
        except nvml.NVMLError:  # this GPU has no link of that number
            continue
    return found


def _nvlink_mbps(nvml: Any, gpu: Any) -> int:
    (field,) = nvml.nvmlDeviceGetFieldValues(gpu, [nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    return int(field.value.uiVal) if field.nvmlReturn == nvml.NVML_SUCCESS else 0
