"""Who is up: a pure failure detector, beats in, up and down out.

Every node beats once a second to every node it is connected to. A peer is *up* from its first
beat on a connection until the connection ends or it is silent for 3 s; then the connection is
cut, so that every monitor on that node fires at once. Silence does not count while our own clock
ticks were late: the beats may be waiting in our mailbox.

A beat names the sender's incarnation (a restart is noticed even where the connection hides it)
and the version of its facts (memory, devices, roles); the facts themselves only when they have
changed. Whoever misses a version asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from bridge.term import Atom, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds between beats, of silence until a peer is down, between looks."""

    beat_s: float = 1.0
    silence_s: float = 3.0
    check_s: float = 0.25


class Beat(NamedTuple):
    """A sign of life.

    Attributes:
        incarnation: differs after each start of the sender.
        facts_version: grows with each change of its facts.
        facts: None where they are as told before.
    """

    incarnation: int
    facts_version: int
    facts: Term = None


ENDED: Final = "its connection ended"  # why a node is down whose process may just start again

_BEAT: Final = Atom("beat")
_SAME: Final = Atom("same")


def beat_term(beat: Beat) -> Term:
    """``beat`` as a term; ``beat_of`` reads it."""
    facts = _SAME if beat.facts is None else beat.facts
    return (_BEAT, beat.incarnation, beat.facts_version, facts)


def beat_of(term: Any) -> Beat:
    """Read ``beat_term``'s answer. Raises ValueError."""
    match term:
        case ("beat", int(incarnation), int(version), facts):
            return Beat(incarnation, version, None if facts == _SAME else facts)
    raise ValueError(f"not a beat: {term!r}")


@dataclass(frozen=True, slots=True)
class Peer:
    """What is known of one connected node.

    Attributes:
        heard_s: last sign of it, at first the connection itself.
        incarnation: 0 before its first beat.
        facts_version: newest version of its facts that came, -1 for none.
    """

    heard_s: float
    incarnation: int = 0
    facts_version: int = -1

    @property
    def up(self) -> bool:
        return self.incarnation != 0


class Up(NamedTuple):
    """The peer is there."""


class Down(NamedTuple):
    """The peer is gone, or is another incarnation now."""

    why: str


class Cut(NamedTuple):
    """End the connection to it."""


class NewFacts(NamedTuple):
    """The peer's facts are these."""

    facts: Term


class AskFacts(NamedTuple):
    """Ask it for its facts."""


Action = Up | Down | Cut | NewFacts | AskFacts


def connected(now_s: float) -> Peer:
    """A connection has come up; send a beat with all facts on it at once."""
    return Peer(now_s)


def on_beat(peer: Peer, beat: Beat, now_s: float) -> tuple[Peer, tuple[Action, ...]]:
    """The peer gave a sign of life."""
    if beat.incarnation == peer.incarnation and beat.facts_version == peer.facts_version:
        return Peer(now_s, peer.incarnation, peer.facts_version), ()
    actions: list[Action] = []
    if beat.incarnation != peer.incarnation:
        if peer.up:
            actions.append(Down("it has started again"))
        actions.append(Up())
        peer = Peer(now_s, beat.incarnation)
    if beat.facts is not None:
        actions.append(NewFacts(beat.facts))
        peer = replace(peer, facts_version=beat.facts_version)
    elif beat.facts_version != peer.facts_version:
        actions.append(AskFacts())
    return replace(peer, heard_s=now_s), tuple(actions)


def disconnected(peer: Peer) -> tuple[Action, ...]:
    """The connection has ended."""
    return (Down(ENDED),) if peer.up else ()


def check(peer: Peer, now_s: float, checked_s: float, limits: Limits) -> tuple[Action, ...]:
    """Look at one peer. ``checked_s`` is when the last look at all peers was."""
    silent_s = now_s - peer.heard_s
    if silent_s <= limits.silence_s or now_s - checked_s >= 2 * limits.check_s:
        return ()
    down = (Down(f"silent for {silent_s:.1f} s"),) if peer.up else ()
    return (*down, Cut())
