"""Machines meet at their fastest common network, and at their names where they share none."""

from __future__ import annotations

import pytest

from control.discovery.addresses import Interface
from control.meeting import Reach, link_kind, meet, reaches_from, reaches_of, reaches_term
from control.topology import Kind


def wired(host: str, mbps: int = 1000, bits: int = 24) -> Reach:
    return Reach(host=host, prefix_bits=bits, speed_mbps=mbps)


def wifi(host: str) -> Reach:
    return Reach(host=host, prefix_bits=24, speed_mbps=2400, kind=Kind.WIFI)


LOOPBACK = Reach(host="127.0.0.1", prefix_bits=8, kind=Kind.LOOPBACK)


@pytest.mark.parametrize(
    ("reaches", "hosts"),
    [
        ({"a": [wired("10.0.0.1")]}, ["10.0.0.1"]),
        ({"a": [wired("10.0.0.1")], "b": [wired("10.0.0.2")]}, ["10.0.0.1", "10.0.0.2"]),
        (  # the second, faster link
            {
                "a": [wired("10.0.0.1"), wired("10.9.0.1", 10_000)],
                "b": [wired("10.0.0.2"), wired("10.9.0.2", 10_000)],
            },
            ["10.9.0.1", "10.9.0.2"],
        ),
        (  # its slower end counts
            {
                "a": [wired("10.0.0.1", 2500), wired("10.9.0.1", 10_000)],
                "b": [wired("10.0.0.2", 2500), wired("10.9.0.2", 100)],
            },
            ["10.0.0.1", "10.0.0.2"],
        ),
        (  # a wire before a faster radio
            {
                "a": [wifi("10.5.0.1"), wired("10.0.0.1", 100)],
                "b": [wifi("10.5.0.2"), wired("10.0.0.2", 100)],
            },
            ["10.0.0.1", "10.0.0.2"],
        ),
        (  # one that all three share
            {
                "a": [wired("10.9.0.1", 10_000), wired("10.0.0.1")],
                "b": [wired("10.9.0.2", 10_000), wired("10.0.0.2")],
                "c": [wired("10.0.0.3")],
            },
            ["10.0.0.1", "10.0.0.2", "10.0.0.3"],
        ),
        (  # through a router: as they are named
            {"a": [wired("10.0.0.1"), wired("10.3.0.1")], "b": [wired("10.1.0.2")]},
            ["10.0.0.1", "10.1.0.2"],
        ),
        ({"a": [LOOPBACK], "b": [LOOPBACK]}, ["127.0.0.1", "127.0.0.1"]),
        ({"a@h1": [], "b@h2": []}, ["h1", "h2"]),  # they told nothing
        ({"a@h1": [Reach(host="h1")], "b": [wired("10.0.0.2")]}, ["h1", "10.0.0.2"]),
    ],
)
def test_the_fastest_network_that_all_share(
    reaches: dict[str, list[Reach]], hosts: list[str]
) -> None:
    met = meet(reaches)
    assert [met[node].host for node in sorted(reaches)] == hosts
    assert meet(dict(reversed(reaches.items()))) == met


def test_what_interfaces_say() -> None:
    interfaces = [
        Interface(name="lo", address="127.0.0.1", prefix_bits=8),
        Interface(name="eth0", address="10.0.0.1", prefix_bits=16, speed_mbps=1000),
        Interface(name="wlan0", address="10.5.0.1", prefix_bits=24, wireless=True),
        Interface(name="thunderbolt0", address="10.7.0.1", prefix_bits=30, speed_mbps=20_000),
        Interface(name="ib0", address="10.8.0.1", prefix_bits=24, speed_mbps=100_000),
    ]
    hosts = ["10.0.0.1", "10.5.0.1", "10.7.0.1", "10.8.0.1", "box.lan"]
    found = reaches_of(hosts, interfaces)
    kinds = [Kind.ETHERNET, Kind.WIFI, Kind.THUNDERBOLT, Kind.RDMA, Kind.ETHERNET]
    assert [(one.host, one.kind) for one in found] == list(zip(hosts, kinds, strict=True))
    assert str(found[0].network) == "10.0.0.0/16"
    assert found[-1].network is None
    assert reaches_of(["127.0.0.1"], interfaces) == (LOOPBACK,)
    assert reaches_from(reaches_term(found)) == found


def test_a_link_is_what_its_slower_end_is() -> None:
    assert link_kind(wired("10.0.0.1"), wifi("10.0.0.2")) == Kind.WIFI
    assert link_kind(LOOPBACK, LOOPBACK) == Kind.LOOPBACK
