"""By which address and interface a rank is met: that on the way to rank 0, and no other."""

from __future__ import annotations

import psutil
import pytest

from compute.collectives import Rendezvous
from compute.places import Listeners
from compute.rendezvous_store import interface_of, own_address

pytestmark = pytest.mark.slow  # for the import of torch


def rendezvous(rank: int, host: str) -> Rendezvous:
    return Rendezvous(
        instance="i",
        epoch=1,
        rank=rank,
        hosts=("a", "b"),
        address=(host, 5),
        timeout_s=1.0,
    )


def test_a_rank_uses_the_address_that_leads_to_rank_0() -> None:
    assert own_address(rendezvous(1, "127.0.0.1")) == "127.0.0.1"
    assert own_address(rendezvous(0, "10.1.2.3")) == "10.1.2.3"


def test_an_address_has_an_interface() -> None:
    name = interface_of("127.0.0.1")
    assert "127.0.0.1" in [a.address for a in psutil.net_if_addrs()[name]]
    assert interface_of("203.0.113.9") == ""


def test_places_are_on_their_address_alone() -> None:
    hosts = ["127.0.0.1"]
    if "::1" in [a.address for found in psutil.net_if_addrs().values() for a in found]:
        hosts.append("::1")
    for host in hosts:
        listeners = Listeners(host)
        with listeners.take("orders") as orders:
            assert orders.getsockname()[0] == host
        assert listeners.place.host == host
        listeners.close()
