"""What membership knows of one other node, and how it is shown. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from bridge.term import Atom, Term
from control import membership_rule as rule
from control.discovery.addresses import parse_ip
from control.hello import Hello

LEFT: Final = "it has left"  # why a node is down that said goodbye


@dataclass(slots=True)
class Member:
    """A node that said hello, or did once.

    Attributes:
        peer: the failure detector's view; None while there is no connection.
        facts: as its own ``nodes`` shows itself.
        clock_ahead_s: how far its clock was ahead of ours when it said hello.
        since_s: of the present state, by the event loop's clock.
        refused: why it is no member; empty for a member.
    """

    hello: Hello | None
    facts: dict[Any, Term]
    since_s: float
    peer: rule.Peer | None = None
    note: str = ""
    why: str = ""
    refused: str = ""
    clock_ahead_s: float = 0.0

    @property
    def up(self) -> bool:
        return self.peer is not None and self.peer.up


def row(node: str, member: Member) -> dict[Any, Term]:
    """One line of ``nodes``, as CONTRACT section 3 has it."""
    state = "up" if member.up else "refused" if member.refused else "down"
    return {
        Atom("name"): Atom(node),
        Atom("state"): Atom(state),
        **(member.facts or _NOTHING),
        **remarks(member.note, "" if member.up else member.why, member.clock_ahead_s),
    }


def remarks(note: str = "", why: str = "", clock_ahead_s: float = 0.0) -> dict[Any, Term]:
    """``note``: what differs and does not hinder; ``why``: it is not up; its clock against ours."""
    return {
        Atom("note"): note,
        Atom("why"): why,
        Atom("clock_ahead_s"): clock_ahead_s,
    }


_NOTHING: Final[dict[Any, Term]] = {
    Atom("roles"): [],
    Atom("memory"): {
        Atom("total_bytes"): 0,
        Atom("available_bytes"): 0,
        Atom("limit_bytes"): 0,
    },
    Atom("cores"): 0,
    Atom("has_mlx"): False,
    Atom("devices"): [],
    Atom("os_pid"): 0,
    Atom("version"): "",
    Atom("addresses"): [],
    Atom("speeds"): [],
}


def thread_targets(host: str, hellos: Iterable[Hello]) -> dict[str, tuple[str, int]]:
    """Where the threads of other nodes take beats: of each its first address that ours can send to.

    Args:
        host: where our own thread is bound.
    """
    ours = parse_ip(host)
    version = ours.version if ours is not None else 4
    targets: dict[str, tuple[str, int]] = {}
    for hello in hellos:
        for address in hello.addresses if hello.beat_port else ():
            ip = parse_ip(address.host)
            if ip is not None and ip.version == version:
                targets[hello.node] = (address.host, hello.beat_port)
                break
    return targets
