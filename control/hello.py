"""The join handshake: what two nodes tell each other once they are connected, and the verdict.

The cookie has been checked by the connection. Here both sides check that they mean the same
cluster and speak the same language; a stock Erlang node never says hello, and is no machine of
ours. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.discovery.candidates import Address

PROTOCOL: Final = 1  # of the messages between the parts of two nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """One side of it.

    Attributes:
        pid: the membership process that says it; its node is who joins.
        incarnation: milliseconds since 1970 at its start; tells two lives apart.
        beat_port: UDP port for beats of a thread (``beats``); 0 for none.
        addresses: where its distribution listens.
        answer: said because the other side said hello first.
        clock_s: seconds since 1970 when it was said.
        facts_version, facts: as in ``membership_rule.Beat``.
    """

    pid: Pid
    cluster: str
    version: str
    incarnation: int
    beat_port: int
    addresses: tuple[Address, ...]
    facts_version: int
    facts: Term
    clock_s: float = 0.0
    answer: bool = False
    protocol: int = PROTOCOL

    @property
    def node(self) -> str:
        return str(self.pid.node)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``refuse``: why they must not be joined. ``note``: what differs and does not hinder."""

    refuse: str = ""
    note: str = ""


def judge(mine: Hello, theirs: Hello) -> Verdict:
    """Whether ``theirs`` may be a machine of our cluster."""
    if theirs.cluster != mine.cluster:
        return Verdict(
            refuse=f"it is of the cluster {theirs.cluster!r}, this node of {mine.cluster!r}: give "
            f"both the same cluster_name to join them"
        )
    if theirs.protocol != mine.protocol:
        return Verdict(
            refuse=f"it speaks protocol {theirs.protocol} (version {theirs.version}), this node "
            f"protocol {mine.protocol} (version {mine.version}): install the same version on both"
        )
    if theirs.version != mine.version:
        return Verdict(
            note=f"it runs version {theirs.version}, this node {mine.version}: "
            "install the same on both"
        )
    return Verdict()


def hello_term(hello: Hello) -> Term:
    """``hello`` as a message; ``hello_of`` reads it."""
    data: dict[Any, Term] = {
        Atom("protocol"): hello.protocol,
        Atom("cluster"): hello.cluster,
        Atom("version"): hello.version,
        Atom("incarnation"): hello.incarnation,
        Atom("beat_port"): hello.beat_port,
        Atom("addresses"): addresses_term(hello.addresses),
        Atom("facts_version"): hello.facts_version,
        Atom("facts"): hello.facts,
        Atom("clock_s"): hello.clock_s,
        Atom("answer"): hello.answer,
    }
    return (Atom("hello"), hello.pid, data)


def hello_of(pid: Pid, data: dict[Any, Any]) -> Hello:
    """Read ``hello_term``'s answer. Raises ValueError."""
    try:
        return Hello(
            pid=pid,
            cluster=text_of(data["cluster"]),
            version=text_of(data["version"]),
            incarnation=int(data["incarnation"]),
            beat_port=int(data["beat_port"]),
            addresses=addresses_of(data["addresses"]),
            facts_version=int(data["facts_version"]),
            facts=data["facts"],
            clock_s=float(data["clock_s"]),
            answer=bool(data["answer"]),
            protocol=int(data["protocol"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"not a hello: {type(exc).__name__}: {exc}") from exc


def addresses_term(addresses: tuple[Address, ...]) -> list[Term]:
    """``[{Host, Port}]``."""
    return [(address.host, address.port) for address in addresses]


def addresses_of(term: Any) -> tuple[Address, ...]:
    """Read ``addresses_term``'s answer. Raises ValueError, TypeError."""
    return tuple(Address(text_of(host), int(port)) for host, port in term)
