"""Who must agree before anybody may place: the roster, and what counts as its majority.

A *roster* is the list of machines whose majority decides. Two kinds:

* fixed: the machines of the configuration, the same on every node, never changed by us;
* agreed: where nothing is configured, the membership that the leader last agreed on with a
  majority. It begins as the machine alone, and each change passes through a *joint* roster,
  under which a majority of the old machines and one of the new are both needed.

Half of the machines suffice where the *tie-breaker* is among them. So a cluster of two goes on
without the other machine on the tie-breaker's side alone. The tie-breaker is the one that the
settings name; else the first machine of the configuration, or the leader that agreed the roster.
Any two quorums share a machine, so at most one side of a split has one.

Source: Ongaro 2014, Consensus (Raft), section 4.3, joint consensus.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridge.term import Atom, Term

FIXED = "configured:"


@dataclass(frozen=True, slots=True)
class Roster:
    """The machines that decide.

    Attributes:
        lineage: names the cluster; two clusters that never met have different ones.
        stamp: ``(epoch, number)`` of the last change; the larger is the newer of a lineage.
        members: node names, sorted.
        tie_breaker: its half is enough; empty for none.
        old_members: members before a change that is under way; empty when none is.
    """

    lineage: str
    stamp: tuple[int, int]
    members: tuple[str, ...]
    tie_breaker: str = ""
    old_members: tuple[str, ...] = ()
    old_tie_breaker: str = ""

    @property
    def fixed(self) -> bool:
        return is_fixed(self.lineage)

    @property
    def joint(self) -> bool:
        return bool(self.old_members)

    @property
    def everyone(self) -> frozenset[str]:
        """Members before and after the change that may be under way."""
        return frozenset(self.members).union(self.old_members)


def is_fixed(lineage: str) -> bool:
    """Whether rosters of this lineage come from a configuration."""
    return lineage.startswith(FIXED)


def configured(members: Sequence[str], tie_breaker: str = "") -> Roster:
    """The fixed roster of a configuration: same machines and tie-breaker, same lineage.

    Args:
        members: node names in the order of the configuration.
        tie_breaker: the setting; empty makes the first member it.

    Raises:
        ValueError: no members, or the tie-breaker is none of them.
    """
    if not members or (tie_breaker and tie_breaker not in members):
        raise ValueError(f"tie-breaker {tie_breaker!r} is none of the machines {list(members)}")
    names = tuple(sorted(set(members)))
    breaker = tie_breaker or members[0]
    digest = hashlib.sha256("\n".join((breaker, *names)).encode()).hexdigest()[:16]
    return Roster(FIXED + digest, (0, 0), names, breaker)


def alone(node: str, unique: str) -> Roster:
    """The roster of a machine that never met another; ``unique`` differs at each first start."""
    return Roster(f"{node}#{unique}", (0, 0), (node,), node)


def has_quorum(roster: Roster, nodes: Collection[str]) -> bool:
    """Whether ``nodes`` may decide for all of the roster."""
    return _decides(roster.members, roster.tie_breaker, nodes) and (
        not roster.old_members or _decides(roster.old_members, roster.old_tie_breaker, nodes)
    )


def _decides(members: Sequence[str], tie_breaker: str, nodes: Collection[str]) -> bool:
    present = sum(map(nodes.__contains__, members))
    return 2 * present > len(members) or (2 * present == len(members) and tie_breaker in nodes)


def quorum_since(roster: Roster, heard_s: Mapping[str, float]) -> float:
    """The latest time at or after which a quorum was heard; minus infinity where there is none.

    Args:
        heard_s: when each node was last heard, seconds.
    """
    since_s = _since(roster.members, roster.tie_breaker, heard_s)
    if roster.old_members:
        since_s = min(since_s, _since(roster.old_members, roster.old_tie_breaker, heard_s))
    return since_s


def _since(members: Sequence[str], tie_breaker: str, heard_s: Mapping[str, float]) -> float:
    times = sorted((heard_s.get(m, -math.inf) for m in members), reverse=True)
    since_s = times[len(members) // 2]
    if len(members) % 2 == 0 and tie_breaker in members:
        half_s = min(times[len(members) // 2 - 1], heard_s.get(tie_breaker, -math.inf))
        since_s = max(since_s, half_s)
    return since_s


def missing(roster: Roster, nodes: Collection[str]) -> str:
    """Why ``nodes`` are no quorum, for people."""
    parts = []
    for members, breaker in (
        (roster.members, roster.tie_breaker),
        (roster.old_members, roster.old_tie_breaker),
    ):
        if members and not _decides(members, breaker, nodes):
            present = sum(1 for member in members if member in nodes)
            even = breaker and len(members) % 2 == 0
            half = f", or {len(members) // 2} with {breaker}" if even else ""
            away = ", ".join(m for m in members if m not in nodes)
            parts.append(
                f"{present} of {len(members)} machines are here, {len(members) // 2 + 1}{half} "
                f"are needed; missing: {away}"
            )
    return "; ".join(dict.fromkeys(parts))


def stamped(roster: Roster, epoch: int) -> Roster:
    """The same roster as the leader of ``epoch`` states it. A fixed one stays as it is."""
    if roster.fixed:
        return roster
    return replace(roster, stamp=(epoch, roster.stamp[1] + 1))


def propose(roster: Roster, members: Iterable[str], tie_breaker: str, epoch: int) -> Roster:
    """The joint roster on the way from ``roster`` to ``members``."""
    assert not roster.joint, "one change at a time"
    assert not roster.fixed, "the configuration's machines are not ours to change"
    return Roster(
        roster.lineage,
        (epoch, roster.stamp[1] + 1),
        tuple(sorted(set(members))),
        tie_breaker,
        roster.members,
        roster.tie_breaker,
    )


def revise(roster: Roster, members: Iterable[str], epoch: int) -> Roster:
    """A joint roster on the way to other ``members``: the old ones keep their say meanwhile."""
    assert roster.joint, "nothing is under way"
    return replace(stamped(roster, epoch), members=tuple(sorted(set(members))))


def settle(roster: Roster, epoch: int) -> Roster:
    """The roster after its change: the old machines have no say any more."""
    return replace(stamped(roster, epoch), old_members=(), old_tie_breaker="")


def roster_term(roster: Roster) -> Term:
    """``roster`` as a term; ``roster_of`` reads it."""
    return (
        Atom(roster.lineage),
        roster.stamp,
        [Atom(m) for m in roster.members],
        Atom(roster.tie_breaker),
        [Atom(m) for m in roster.old_members],
        Atom(roster.old_tie_breaker),
    )


def roster_of(term: Any) -> Roster:
    """Read ``roster_term``'s answer. Raises ValueError."""
    match term:
        case (str(lineage), (int(e), int(n)), [*members], str(breaker), [*old], str(old_breaker)):
            if members and all(isinstance(m, str) for m in (*members, *old)):
                return Roster(
                    str(lineage),
                    (e, n),
                    tuple(map(str, members)),
                    str(breaker),
                    tuple(map(str, old)),
                    str(old_breaker),
                )
    raise ValueError(f"not a roster: {term!r}")
