"""What a driver says of GPUs becomes a machine's link to itself."""

from __future__ import annotations

import pytest

from control.gpu_links import Pair, gpu_link, link_of, slowest
from control.topology import Kind


@pytest.mark.parametrize(
    ("pair", "kind", "gigabytes"),
    [
        (Pair(nvlinks=18, nvlink_mbps=26562, switched=True), Kind.NVSWITCH, 382),
        (Pair(nvlinks=4, nvlink_mbps=25781), Kind.NVLINK, 82),
        (Pair(pcie_lanes=16, pcie_generation=4), Kind.PCIE_X16, 25),
        (Pair(pcie_lanes=8, pcie_generation=3), Kind.PCIE_X8, 6.3),
        (Pair(pcie_lanes=16, pcie_generation=9), Kind.PCIE_X16, 97),  # newer than the table
        (Pair(nvlinks=2, nvlink_mbps=0), Kind.PCIE_X16, 12.6),  # the driver does not say how fast
    ],
)
def test_figures_of_a_pair(pair: Pair, kind: Kind, gigabytes: float) -> None:
    link = link_of(pair)
    assert link.kind == kind
    assert link.bytes_per_s / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_the_worst_pair_counts() -> None:
    pairs = [Pair(nvlinks=4, nvlink_mbps=25781), Pair(pcie_lanes=8)]
    assert slowest(pairs) == link_of(pairs[1])
    assert slowest([]) is None


def test_this_machine_can_be_asked() -> None:
    link = gpu_link()
    assert link is None or link.kind in (
        Kind.NVLINK,
        Kind.NVSWITCH,
        Kind.PCIE_X16,
        Kind.PCIE_X8,
    )
