"""Which name a node takes, whose majority decides, and that nothing is looked for without need."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from bridge.node import Node
from control.discovery.addresses import Interface
from ops.config import Config, loads
from ops.errors import BadUsage
from ops.joining import (
    check_peer,
    choose_node_name,
    configured_machines,
    listed_host,
    make_joining,
    primary_address,
)
from ops.start_settings import StartSettings


def config(text: str = "") -> Config:
    return loads(text, "c.yaml", Path())


def link(name: str, address: str) -> Interface:
    return Interface(name=name, address=address, prefix_bits=24)


def test_a_node_that_is_told_nothing_is_alone_on_loopback() -> None:
    assert choose_node_name(None, config(), ()) == "phalanx@127.0.0.1"
    one = config("devices: [{hostname: here, max_memory: 1GB}]")
    assert choose_node_name(None, one, ()) == "phalanx@127.0.0.1"


def test_a_name_that_is_given_is_taken() -> None:
    assert choose_node_name("a@10.0.0.1", config(), ("10.0.0.2",)) == "a@10.0.0.1"
    named = config("node: {name: b@10.0.0.3}")
    assert choose_node_name(None, named, ("10.0.0.2",)) == "b@10.0.0.3"
    assert choose_node_name("a@10.0.0.1", named, ()) == "a@10.0.0.1"


def test_peers_on_this_machine_need_no_other_name() -> None:
    assert choose_node_name(None, config(), ("127.0.0.1:4000",)) == "phalanx@127.0.0.1"
    assert choose_node_name("a@127.0.0.1", config(), ("localhost",)) == "a@127.0.0.1"


def test_a_loopback_name_cannot_join_another_machine() -> None:
    with pytest.raises(BadUsage, match=r"listens on this machine alone, so 10\.0\.0\.2 cannot"):
        choose_node_name("a@127.0.0.1", config(), ("10.0.0.2",))
    static = config("node: {name: a@localhost}\nnetwork: {discovery: static, peers: [10.0.0.9]}")
    with pytest.raises(BadUsage, match=r"10\.0\.0\.9 cannot be joined"):
        choose_node_name(None, static, ())


def test_a_peer_that_cannot_be_found_is_bad_usage() -> None:
    with pytest.raises(BadUsage, match=r"no way to no\.such\.host\.invalid"):
        choose_node_name(None, config(), ("no.such.host.invalid",))


@pytest.mark.parametrize("peer", ["", "a:b", "a:0", "[::1"])
def test_what_is_no_peer_is_bad_usage(peer: str) -> None:
    with pytest.raises(BadUsage, match="write HOST or HOST:PORT"):
        check_peer(peer)


def test_the_primary_address_is_private_and_no_bridge_to_containers() -> None:
    links = [link("docker0", "172.17.0.1"), link("lo", "127.0.0.1"), link("eth0", "8.8.8.8")]
    assert primary_address(links) is None
    assert primary_address([*links, link("eth1", "10.99.0.7")]) == "10.99.0.7"


def test_the_machines_of_the_configuration_decide_where_nodes_are_named_after_them() -> None:
    text = "devices: [{hostname: a.local}, {hostname: b.local}]\nnetwork: {tie_breaker: b.local}"
    names = ("n@a.local", "n@b.local")
    assert configured_machines("n@a.local", config(text)) == (names, "n@b.local")
    assert configured_machines("n@10.0.0.1", config(text)) == ((), "n@b.local")
    assert configured_machines("n@10.0.0.1", config()) == ((), "")


def test_a_listed_host_name_must_mean_an_address_of_our_networks() -> None:
    here = config(f"devices: [{{hostname: {socket.gethostname()}}}, {{hostname: other}}]")
    assert listed_host(here, [link("lo", "127.0.0.1")]) is None
    assert listed_host(config("devices: [{hostname: other}]"), []) is None


@pytest.mark.parametrize(
    ("node", "text", "join", "found"),
    [
        ("a@127.0.0.1", "", (), []),
        ("a@localhost", "network: {discovery: auto}", (), []),
        ("a@10.0.0.1", "", (), ["zeroconf"]),
        ("a@10.0.0.1", "", ("10.0.0.2",), ["zeroconf", "static"]),
        ("a@127.0.0.1", "", ("127.0.0.1:1",), ["static"]),
        ("a@10.0.0.1", "network: {discovery: static, peers: [b]}", (), ["static"]),
        ("a@127.0.0.1", "network: {discovery: epmd}", (), ["epmd"]),
    ],
)
def test_strategies_by_address_and_configuration(
    node: str, text: str, join: tuple[str, ...], found: list[str]
) -> None:
    made = Node(node, "SECRET")
    made.address = ("10.0.0.1", 4000)
    settings = StartSettings(
        home=Path("/h"),
        config=None,
        node=node,
        http_host="127.0.0.1",
        http_port=0,
        models=(),
        no_model=True,
        log_json=False,
        epmd_port=4369,
        join=join,
    )
    joining = make_joining(made, settings, config(text), "SECRET", ["10.0.0.1"], None)
    assert [one.name for one in joining.strategies()] == found
    assert [str(one) for one in joining.addresses()] == ["10.0.0.1:4000"]
