"""What one node knows of elections: data, and the questions that it alone answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from control.election_messages import Lead, Message, Stamp, Status
from control.quorum import Roster, missing, quorum_since


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times of elections, seconds.

    Attributes:
        campaign_s: longest wait for the nodes of a round; messages are sent again after it.
        lead_s: between a leader's signs of life.
        hold_s: whoever accepted such a sign agrees to nobody else for so long, by its own clock.
        lease_s: a leader has authority for so long after it sent the sign that a quorum accepted,
            by its own clock. Shorter than ``hold_s``, so that clocks may differ in speed.
        forget_s: a machine of an agreed roster that is away for longer is no member any more.
    """

    campaign_s: float = 3.0
    lead_s: float = 1.0
    hold_s: float = 3.0
    lease_s: float = 2.4
    forget_s: float = 600.0


class Promise(NamedTuple):
    """The newest epoch that this node agreed to, and whose it is. On disk before it is told."""

    epoch: int = 0
    holder: str = ""


class Authority(NamedTuple):
    """The right to place, until a time of this node's clock."""

    epoch: int
    until_s: float


# -- what happens, and what is to be done about it ------------------------------------------


class Heard(NamedTuple):
    """``sender`` says something."""

    sender: str
    message: Message


class NodeUp(NamedTuple):
    """Another node is there."""

    node: str


class NodeDown(NamedTuple):
    """Another node is gone."""

    node: str


class Tick(NamedTuple):
    """Time has passed: four times a second."""


class CommandsSeen(NamedTuple):
    """So many commands the cluster has seen."""

    commands: int


class DocumentsSafe(NamedTuple):
    """A quorum of the roster with this stamp has the desired state on disk."""

    stamp: Stamp


class Leave(NamedTuple):
    """This node ends in good order: it is no candidate any more."""


Event = Heard | NodeUp | NodeDown | Tick | CommandsSeen | DocumentsSafe | Leave


class Send(NamedTuple):
    """Give ``message`` to these nodes."""

    to: tuple[str, ...]
    message: Message


class Save(NamedTuple):
    """Have this on disk before anything that follows is done."""

    promise: Promise
    roster: Roster


class Changed(NamedTuple):
    """Another leader, epoch or authority than before."""

    leader: str
    epoch: int
    authority: bool


Action = Send | Save | Changed


@dataclass(kw_only=True)
class State:
    """Never changed in place: ``election_rule.step`` makes the next one.

    Attributes:
        promise, roster: what is on disk.
        tie_breaker: the setting; empty for none.
        gated: a change of the roster waits for ``DocumentsSafe``.
        up: the other nodes that are there.
        clock, seniority, commands: as in ``Status``.
        leader: whom this node follows, or itself; empty when nobody leads it.
        head: winner of the last round, which may have no quorum.
        held_by, held_epoch, held_until_s: to whom and until when this node is bound.
        statuses: of the round ``clock``, by node; None while there is no campaign.
        campaign_until_s: then a round counts even if not all have answered.
        claim: epoch that this node asks for, 0 for none, with ``grants`` since ``claim_s``.
        leading: epoch that this node leads, 0 for none.
        support: when the sign of life that each node last accepted was sent.
        stored: stamp of the roster on each node's disk.
        sure: had authority when last looked; ``authority`` has the truth.
        suitor: leader of another cluster, its last sign, and when that came.
    """

    node: str
    candidate: bool
    limits: Limits
    roster: Roster
    promise: Promise
    started_s: float
    tie_breaker: str = ""
    gated: bool = True
    up: frozenset[str] = frozenset()
    down_s: Mapping[str, float] = field(default_factory=dict)
    clock: int = 0
    seniority: int = 0
    commands: int = 0
    leader: str = ""
    head: str = ""
    held_by: str = ""
    held_epoch: int = 0
    held_until_s: float = 0.0
    statuses: Mapping[str, Status] | None = None
    round_open: bool = False
    campaign_until_s: float = 0.0
    resend_s: float = 0.0
    claim: int = 0
    claim_s: float = 0.0
    grants: frozenset[str] = frozenset()
    leading: int = 0
    support: Mapping[str, float] = field(default_factory=dict)
    stored: Mapping[str, Stamp] = field(default_factory=dict)
    next_lead_s: float = 0.0
    sure: bool = False
    safe_stamp: Stamp = (-1, -1)
    suitor: tuple[str, Lead, float] | None = None

    def copy(self) -> State:
        """Another state with the same content."""
        other = object.__new__(State)
        other.__dict__.update(self.__dict__)
        return other


def initial(
    node: str,
    *,
    candidate: bool,
    roster: Roster,
    promise: Promise,
    now_s: float,
    limits: Limits | None = None,
    tie_breaker: str = "",
    gated: bool = True,
) -> State:
    """The state of a node that starts with ``roster`` and ``promise`` on its disk.

    It may have been bound to the holder of its promise when it ended, so it still is.
    """
    limits = limits or Limits()
    bound = promise.holder not in ("", node)
    return State(
        node=node,
        candidate=candidate,
        limits=limits,
        roster=roster,
        promise=promise,
        started_s=now_s,
        tie_breaker=tie_breaker,
        gated=gated,
        seniority=0 if candidate else -1,
        held_by=promise.holder if bound else "",
        held_epoch=promise.epoch if bound else 0,
        held_until_s=now_s + limits.hold_s if bound else now_s,
    )


def authority(state: State, now_s: float) -> Authority | None:
    """The right to place that this node has now, if it has one."""
    if not state.leading:
        return None
    heard_s = {**state.support, state.node: now_s}
    until_s = quorum_since(state.roster, heard_s) + state.limits.lease_s
    return Authority(state.leading, until_s) if now_s < until_s else None


def why_none(state: State, now_s: float) -> str:
    """Why this node has no authority, for people."""
    if not state.leading:
        return f"{state.leader or 'nobody'} leads" + (
            "" if state.leader else "; " + missing(state.roster, state.up | {state.node})
        ).removesuffix("; ")
    fresh_s = now_s - state.limits.lease_s
    here = {n for n, sent_s in state.support.items() if sent_s > fresh_s} | {state.node}
    return missing(state.roster, here)


def fence(newest_epoch: int, epoch: int) -> bool:
    """Whether a command of ``epoch`` may be obeyed where ``newest_epoch`` was agreed to."""
    return epoch >= newest_epoch
