"""Discovery without a network: proofs, addresses, retries, peers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.discovery.addresses import (
    Interface,
    bindable,
    fastest_first,
    is_loopback,
    listen_hosts,
)
from control.discovery.candidates import (
    LAST_RETRY_S,
    Address,
    Candidate,
    Identity,
    candidate_of_service,
    parse_peer,
    retry_s,
    service_name,
    service_text,
)

US = Identity(node="a@10.0.0.1", cluster="lab", version="1", cookie="SECRET")


def announced(other: Identity, *, port: int = 4000, said_port: int | None = None) -> Candidate:
    text = {
        key.encode(): value.encode() for key, value in service_text(other, port, "0a1b").items()
    }
    found = candidate_of_service(US, text, ["10.0.0.2", "fd00::2"], said_port or port)
    assert found is not None
    return found


def other(cluster: str = "lab", cookie: str = "SECRET") -> Identity:
    return Identity(node="b@10.0.0.2", cluster=cluster, version="2", cookie=cookie)


def test_a_node_of_our_cluster_may_be_joined_at_all_its_addresses() -> None:
    found = announced(other())
    assert (found.node, found.refused, found.version) == ("b@10.0.0.2", "", "2")
    assert found.addresses == (Address("10.0.0.2", 4000), Address("fd00::2", 4000))


@pytest.mark.parametrize(
    ("who", "why"),
    [
        (other(cookie="OTHER"), "another secret"),
        (other(cluster="home"), "of the cluster 'home', this node of 'lab'"),
        (other(cluster="home", cookie="OTHER"), "of the cluster 'home'"),
    ],
)
def test_a_node_of_another_secret_or_cluster_is_seen_and_named(who: Identity, why: str) -> None:
    found = announced(who)
    assert found.node == "b@10.0.0.2"
    assert why in found.refused


def test_a_proof_is_good_for_its_own_port_alone() -> None:
    assert "another secret" in announced(other(), said_port=4001).refused


def test_our_own_announcement_and_foreign_ones_are_nobody() -> None:
    own = {k.encode(): v.encode() for k, v in service_text(US, 1, "n").items()}
    assert candidate_of_service(US, own, [], 1) is None
    assert candidate_of_service(US, {b"x": None, b"node": b"\xff"}, [], 1) is None


def test_the_announcement_has_no_secret_in_it() -> None:
    assert "SECRET" not in str(service_text(US, 1, "n")) + service_name(US) + repr(US)


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("host", ("host", None)),
        ("10.0.0.1:99", ("10.0.0.1", 99)),
        ("[fd00::1]:99", ("fd00::1", 99)),
        ("[fd00::1]", ("fd00::1", None)),
        ("fd00::1", ("fd00::1", None)),
    ],
)
def test_peers_are_hosts_with_or_without_a_port(text: str, peer: tuple[str, int | None]) -> None:
    assert parse_peer(text) == peer


@pytest.mark.parametrize(
    "text", ["", ":1", "a:", "a:0", "a:65536", "a:x", "[a]:1", "[::1]1", "[::1"]
)
def test_what_is_no_peer_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_peer(text)


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_retries_wait_longer_and_longer_up_to_a_limit(num_failed: int, chance: float) -> None:
    assert 0.25 <= retry_s(num_failed, chance) <= LAST_RETRY_S
    assert retry_s(num_failed, chance) <= retry_s(num_failed + 1, chance)


def link(address: str, bits: int, speed: int = 1000, *, wireless: bool = False) -> Interface:
    return Interface(
        name="x", address=address, prefix_bits=bits, speed_mbps=speed, wireless=wireless
    )


OURS = [
    link("127.0.0.1", 8),
    link("192.168.1.5", 24, 300, wireless=True),
    link("10.1.0.5", 24, 1000),
    link("10.2.0.5", 24, 10_000),
    link("fd00::5", 64, 1000),
]


def test_the_fastest_common_link_goes_first() -> None:
    wanted = [
        "10.2.0.5",  # this machine
        "10.2.0.9",  # 10 Gbit/s
        "10.1.0.9",  # 1 Gbit/s, and IPv4 before IPv6
        "fd00::9",
        "192.168.1.9",  # wireless
        "10.9.0.9",  # through a router
        "name.example",
        "93.184.216.34",
    ]
    assert [a.host for a in fastest_first(OURS, [Address(h, 1) for h in sorted(wanted)])] == wanted


@given(st.permutations([Address(h, p) for h in ("10.1.0.9", "10.2.0.9", "h") for p in (1, 2)]))
def test_the_order_does_not_depend_on_how_addresses_came(given_: list[Address]) -> None:
    found = fastest_first(OURS, given_)
    assert found == fastest_first(OURS, sorted(given_))
    assert sorted(found) == sorted(given_)


def test_a_node_listens_where_its_name_says_and_on_private_networks() -> None:
    docker = Interface(name="docker0", address="172.17.0.1", prefix_bits=16)
    links = [*OURS, link("93.184.216.34", 24), docker]
    assert listen_hosts("127.0.0.1", links) == ["127.0.0.1"]
    assert listen_hosts("10.1.0.5", links) == ["10.1.0.5", "192.168.1.5", "10.2.0.5", "fd00::5"]


def test_loopback_is_told_from_the_rest() -> None:
    found = [
        is_loopback(h) for h in ("127.0.0.1", "127.9.0.1", "::1", "localhost", "a", "10.0.0.1")
    ]
    assert found == [True, True, True, True, False, False]


def test_what_cannot_be_bound_is_left_out_but_for_the_first() -> None:
    hosts, port = bindable(["127.0.0.1", "192.0.2.1", "127.0.0.2"], 0)
    assert hosts == ["127.0.0.1", "127.0.0.2"]
    assert port > 0
    with pytest.raises(OSError):
        bindable(["192.0.2.1", "127.0.0.1"], 0)
