"""The election: a pure state machine, ``step(state, event, now_s) -> (state, actions)``.

**The round**, as in exo. Each node has a logical clock. A node that loses its leader adds one to
it, and tells everybody how it stands: clock, seniority, commands seen. Whoever hears a higher
clock takes part with its own. After 3 s, or as soon as every node that is up has answered, the
highest ``(clock, seniority, commands seen, node id)`` has won, and its seniority becomes the size
of the largest round it has won. Nodes without the coordinator role have seniority -1 and never
win. Where no leader comes of it, the messages are sent again every 3 s.

**The epoch.** The winner asks for an epoch higher than all it heard of. A node agrees to one owner
an epoch, on disk, and to none while it is bound to a leader. A quorum (``quorum``) makes the
leader. So an epoch has one leader, and its commands can be told from older ones (``fence``).

**Authority.** A leader gives a sign of life every second; whoever accepts it is bound to it for
3 s of its own clock. The leader may place for 2.4 s of its clock after a sign that a quorum
accepted. A node is free again only when that is over, so two leaders never have authority at
once, however long messages take; only the speed of clocks must agree to a fifth.

**Peace.** A leader does not take part in rounds: it answers with its sign of life, so a join, a
leave or a doubt of others does not disturb it. Whoever finds a newer epoch than its own at a
follower asks for a still newer one without giving up authority.

**Two clusters** (lineages, ``quorum``) that meet keep the leader that the rule ranks higher; the
other resigns, and its nodes follow and become members. Clusters of a configuration come first.

Source: exo, ``shared/election.py`` (round, order, seniority); Ongaro 2014, Raft (epochs, leases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from control.election_messages import (
    Ack,
    Claim,
    Grant,
    Lead,
    Message,
    Nack,
    Refuse,
    Resign,
    Status,
    Tell,
)
from control.election_state import (
    Action,
    Changed,
    CommandsSeen,
    DocumentsSafe,
    Event,
    Heard,
    Leave,
    NodeDown,
    NodeUp,
    Promise,
    Save,
    Send,
    State,
    Tick,
    authority,
)
from control.quorum import Roster, has_quorum, is_fixed, propose, revise, settle, stamped

Rank = tuple[int, int, int, str]


def step(state: State, event: Event, now_s: float) -> tuple[State, tuple[Action, ...]]:
    """What ``event`` at ``now_s`` of this node's clock makes of ``state``, and what to do."""
    turn = _Turn(state, now_s)
    turn.take(event)
    return turn.finish()


def begin(state: State, now_s: float) -> tuple[State, tuple[Action, ...]]:
    """The first round, before any other node is known: a machine that decides alone wins it."""
    turn = _Turn(state, now_s)
    turn.campaign()
    return turn.finish()


def rank(node: str, of: Status | Claim | Lead) -> Rank:
    """The order of candidates: the highest wins."""
    return (of.clock, of.seniority, of.commands, node)


class _Turn:
    """One step: the next state in the making, and the actions so far."""

    def __init__(self, state: State, now_s: float) -> None:
        self.before, self.now_s = state, now_s
        self.s = state.copy()
        self.actions: list[Action] = []

    def finish(self) -> tuple[State, tuple[Action, ...]]:
        s, b = self.s, self.before
        after = (s.leader, s.leading or s.promise.epoch, s.sure)
        if after != (b.leader, b.leading or b.promise.epoch, b.sure):
            self.actions.append(Changed(*after))
        return s, tuple(self.actions)

    def take(self, event: Event) -> None:
        match event:
            case Heard(sender, message):
                if sender != self.s.node:
                    _HANDLERS[type(message)](self, sender, message)
            case Tick():
                self.tick()
            case NodeUp(node):
                self.node_up(node)
            case NodeDown(node):
                self.node_down(node)
            case CommandsSeen(commands):
                self.s.commands = max(self.s.commands, commands)
            case DocumentsSafe(stamp):
                self.s.safe_stamp = stamp
            case Leave():
                self.s.candidate, self.s.seniority = False, -1
                if self.s.leading:
                    self.resign()
                    self.wait()

    # -- small things ----------------------------------------------------------------------

    def send(self, to: Iterable[str], message: Message) -> None:
        nodes = tuple(to)
        if nodes:
            self.actions.append(Send(nodes, message))

    def save(self, promise: Promise, roster: Roster) -> None:
        if (promise, roster) != (self.s.promise, self.s.roster):
            self.s.promise, self.s.roster = promise, roster
            self.actions.append(Save(promise, roster))

    def bound_to_other(self, node: str) -> bool:
        s = self.s
        return s.held_by not in ("", node, s.node) and self.now_s < s.held_until_s

    def status(self, *, ask: bool = False) -> Status:
        s = self.s
        able = s.candidate and has_quorum(s.roster, s.up | {s.node})
        free = not self.bound_to_other(s.node) and not s.leading
        return Status(
            s.clock, s.seniority, s.commands, s.promise.epoch, s.roster.lineage, free, able, ask
        )

    def sign(self, to: Iterable[str]) -> None:
        """Give a sign of life as leader."""
        s = self.s
        r = s.roster
        self.send(
            to,
            Lead(
                s.leading, self.now_s, s.clock, s.seniority, s.commands, r.lineage, r.stamp, s.sure
            ),
        )

    def look(self) -> None:
        self.s.sure = authority(self.s, self.now_s) is not None

    # -- a round ---------------------------------------------------------------------------

    def campaign(self) -> None:
        """Nobody leads: start a round, or take part in the one that is open."""
        if not self.s.round_open:
            self.s.clock += 1
        self.join()

    def join(self) -> None:
        """Take part in the round of this node's clock."""
        self.wait()
        self.send(self.s.up, self.status(ask=True))
        self.evaluate()

    def wait(self) -> None:
        """Without a leader, in a round of which nothing is known yet."""
        s = self.s
        s.leader, s.leading, s.sure, s.claim, s.round_open = "", 0, False, 0, True
        s.campaign_until_s = s.resend_s = self.now_s + s.limits.campaign_s
        s.statuses = {s.node: self.status()}

    def refresh(self) -> None:
        """Tell the others when this node stands otherwise than it said."""
        s = self.s
        assert s.statuses is not None
        mine = self.status()
        if mine != s.statuses[s.node]._replace(ask=False):
            s.statuses = {**s.statuses, s.node: mine}
            self.send(s.up, mine)

    def best(self) -> str:
        """Who has won the round as far as it is known; empty for nobody."""
        s = self.s
        assert s.statuses is not None
        ours = [
            (st.able, rank(node, st))
            for node, st in s.statuses.items()
            if st.seniority >= 0 and st.lineage == s.roster.lineage
        ]
        return max(ours)[1][3] if ours else ""

    def evaluate(self) -> None:
        """Close the round if it is time, and claim an epoch if this node has won."""
        s = self.s
        if s.statuses is None or s.claim:
            return
        if self.now_s < s.campaign_until_s and not s.up <= s.statuses.keys():
            return
        s.head = self.best()
        if s.head != s.node or not s.statuses[s.node].able or self.bound_to_other(s.node):
            return  # a claim is this node's own vote too: it has to be free as any voter
        free = {node for node, st in s.statuses.items() if st.free}
        if has_quorum(s.roster, free):
            self.claim(max(st.epoch for st in s.statuses.values()))

    def claim(self, above: int) -> None:
        s = self.s
        s.claim, s.claim_s = max(above, s.promise.epoch) + 1, self.now_s
        s.grants = frozenset((s.node,))
        self.save(Promise(s.claim, s.node), s.roster)
        self.ask(s.up)
        self.count()

    def ask(self, to: Iterable[str]) -> None:
        s = self.s
        r = s.roster
        self.send(to, Claim(s.claim, s.clock, s.seniority, s.commands, r.lineage, r.stamp))

    def count(self) -> None:
        """Lead, if a quorum has agreed."""
        s = self.s
        if not has_quorum(s.roster, s.grants):
            return
        if not s.leading:
            s.support, s.stored = {}, {}
            s.seniority = max(s.seniority, len(s.statuses or ()))
        s.leader = s.head = s.node
        s.leading, s.claim, s.statuses, s.round_open = s.claim, 0, None, False
        s.held_by, s.suitor = "", None
        self.save(s.promise, stamped(s.roster, s.leading))
        self.look()
        self.lead()

    def lead(self) -> None:
        self.s.next_lead_s = self.now_s + self.s.limits.lead_s
        self.sign(self.s.up)

    def resign(self) -> None:
        s = self.s
        self.send(s.up, Resign(s.leading))

    # -- nodes and time --------------------------------------------------------------------

    def node_up(self, node: str) -> None:
        s = self.s
        s.up |= {node}
        s.down_s = {n: t for n, t in s.down_s.items() if n != node}
        if s.leading:
            self.sign((node,))
        elif s.statuses is not None:
            self.refresh()
            self.send((node,), self.status(ask=True))

    def node_down(self, node: str) -> None:
        s = self.s
        s.up -= {node}
        s.down_s = {**s.down_s, node: self.now_s}
        if s.suitor and s.suitor[0] == node:
            s.suitor = None
        if s.leader == node:
            self.campaign()
        elif s.statuses is not None:
            s.statuses = {n: st for n, st in s.statuses.items() if n != node}
            self.refresh()
            self.evaluate()

    def tick(self) -> None:
        s = self.s
        if s.claim:
            self.ask(s.up - s.grants)
        if s.leading:
            self.look()
            if s.sure and not s.roster.fixed:
                self.keep_roster()
            if self.now_s >= s.next_lead_s:
                self.lead()
        elif s.leader:
            if self.now_s >= s.held_until_s:
                self.campaign()
        elif s.statuses is not None:
            if s.claim and self.now_s >= s.claim_s + s.limits.campaign_s:
                s.claim = 0
            self.refresh()
            if self.now_s >= s.resend_s:
                s.resend_s = self.now_s + s.limits.campaign_s
                self.send(s.up, self.status(ask=True))
            self.evaluate()

    def keep_roster(self) -> None:
        """As leader: let those that follow in, let those long gone out, finish a change."""
        s = self.s
        if s.roster.joint:
            have = {n for n, stamp in s.stored.items() if stamp == s.roster.stamp} | {s.node}
            safe = not s.gated or s.safe_stamp == s.roster.stamp
            new = set(s.roster.members).difference(s.roster.old_members)
            if gone := new - s.up - {s.node}:
                self.change(revise(s.roster, set(s.roster.members) - gone, s.leading))
            elif safe and new <= have and has_quorum(s.roster, have):
                # The new know that they are members: they would not vote else.
                self.change(settle(s.roster, s.leading))
            return
        fresh_s, gone_s = self.now_s - s.limits.lease_s, self.now_s - s.limits.forget_s
        here = {n for n, sent_s in s.support.items() if sent_s > fresh_s and n in s.up}
        stay = {n for n in s.roster.members if n in s.up or s.down_s.get(n, s.started_s) > gone_s}
        members = tuple(sorted(here | stay | {s.node}))
        breaker = s.tie_breaker if s.tie_breaker in members else s.node
        if (members, breaker) != (s.roster.members, s.roster.tie_breaker):
            self.change(propose(s.roster, members, breaker, s.leading))

    def change(self, roster: Roster) -> None:
        self.save(self.s.promise, roster)
        self.look()
        self.lead()

    # -- messages --------------------------------------------------------------------------

    def on_status(self, sender: str, m: Status) -> None:
        s = self.s
        newer = m.clock > s.clock
        if newer:
            s.clock, s.round_open = m.clock, True
        if s.leading:
            if m.ask and not s.sure and m.lineage != s.roster.lineage:
                self.send((sender,), self.status())  # no sign of life that it could follow
            elif m.ask or newer:
                self.sign((sender,))
            return
        if s.leader:
            if m.ask:
                self.send((sender,), self.status())
            return
        if newer:
            self.join()
        if m.ask and not (newer and sender in s.up):
            self.send((sender,), self.status())
        if m.clock < s.clock:
            return
        assert s.statuses is not None
        s.statuses = {**s.statuses, sender: m}
        if len(s.statuses) > len(s.up):
            self.evaluate()

    def on_claim(self, sender: str, m: Claim) -> None:
        s = self.s
        if s.leading and authority(s, self.now_s):
            self.sign((sender,))
            return
        s.clock = max(s.clock, m.clock)
        mine = self.status()
        newest = m.epoch > s.promise.epoch or s.promise == (m.epoch, sender)
        better = s.statuses is not None and mine.able and rank(s.node, mine) > rank(sender, m)
        if (
            m.lineage != s.roster.lineage
            or not newest
            or self.bound_to_other(sender)
            or (better and s.held_by != sender)
        ):
            self.send((sender,), Refuse(m.epoch, mine))
            return
        self.save(Promise(m.epoch, sender), s.roster)
        s.claim = 0
        if s.leader != sender:
            self.wait()
        newer = s.roster if s.roster.stamp > m.stamp else None
        self.send((sender,), Grant(m.epoch, newer))

    def on_grant(self, sender: str, m: Grant) -> None:
        s = self.s
        if m.epoch != s.claim:
            return
        s.grants |= {sender}
        r = m.roster
        if r and r.lineage == s.roster.lineage and r.stamp > s.roster.stamp:
            self.save(s.promise, r)
        self.count()

    def on_refuse(self, sender: str, m: Refuse) -> None:
        s = self.s
        if m.epoch != s.claim:
            return
        if m.status.epoch >= s.claim and s.leading:
            self.claim(m.status.epoch)
        elif s.statuses is None:
            return
        elif m.status.clock > s.clock:
            self.on_status(sender, m.status)
        else:
            s.statuses = {**s.statuses, sender: m.status}
            if m.status.epoch >= s.claim or self.best() != s.node:
                s.claim = 0  # the next tick may claim again, above what it has learnt

    def on_lead(self, sender: str, m: Lead) -> None:
        s = self.s
        foreign = m.lineage != s.roster.lineage
        if foreign and not self.prefers(sender, m):
            return
        if m.epoch < s.promise.epoch or (m.epoch == s.promise.epoch and s.promise.holder != sender):
            self.send((sender,), Nack(s.promise.epoch, m.epoch))
            return
        if foreign and s.leading:
            self.resign()
        s.leading, s.sure, s.claim, s.statuses, s.round_open = 0, False, 0, None, False
        s.suitor = None
        s.leader = s.head = s.held_by = sender
        s.held_epoch, s.held_until_s = m.epoch, self.now_s + s.limits.hold_s
        s.clock, s.commands = max(s.clock, m.clock), max(s.commands, m.commands)
        self.save(Promise(m.epoch, sender), s.roster)
        self.send((sender,), Ack(m.epoch, m.sent_s, s.roster.lineage, s.roster.stamp))

    def prefers(self, sender: str, m: Lead) -> bool:
        """Two clusters meet: whether this node goes over to the other one's leader."""
        s = self.s
        if not m.sure or (s.roster.fixed and not is_fixed(m.lineage)):
            return False
        if s.leading and authority(s, self.now_s):
            mine = (s.seniority, s.commands, s.node)
            return is_fixed(m.lineage) or mine < (m.seniority, m.commands, sender)
        if s.leader != sender:
            s.suitor = (sender, m, self.now_s)
        return s.leader == sender or not self.bound_to_other(sender)

    def on_ack(self, sender: str, m: Ack) -> None:
        s = self.s
        if m.epoch != s.leading:
            return
        r = s.roster
        s.support = {**s.support, sender: max(m.sent_s, s.support.get(sender, m.sent_s))}
        s.seniority = max(s.seniority, len(s.support) + 1)
        if m.lineage == r.lineage:
            s.stored = {**s.stored, sender: m.stamp}
        if (m.lineage, m.stamp) != (r.lineage, r.stamp) and (r.fixed or sender in r.everyone):
            self.send((sender,), Tell(s.leading, self.now_s, r))
        if not s.sure:
            self.look()

    def on_nack(self, sender: str, m: Nack) -> None:
        s = self.s
        if not s.leading or m.of != s.leading or m.epoch <= s.claim:
            return
        if authority(s, self.now_s):
            self.claim(m.epoch)
        else:
            self.campaign()

    def on_tell(self, sender: str, m: Tell) -> None:
        s = self.s
        if s.leader != sender or s.promise != (m.epoch, sender):
            return
        r = m.roster
        if r.lineage == s.roster.lineage:
            take = r.stamp > s.roster.stamp
        else:
            take = not s.roster.fixed and (r.fixed or s.node in r.everyone)
        if take:
            self.save(s.promise, r)
            self.send((sender,), Ack(m.epoch, m.sent_s, r.lineage, r.stamp))

    def on_resign(self, sender: str, m: Resign) -> None:
        s = self.s
        if s.held_by != sender or s.held_epoch > m.epoch:
            return
        s.held_until_s = self.now_s
        if s.leader != sender:
            return
        s.leader = ""
        if s.suitor and self.now_s - s.suitor[2] <= 2 * s.limits.lead_s:
            node, sign, _ = s.suitor
            self.on_lead(node, sign)
        if not s.leader:
            self.campaign()


_HANDLERS: Final[dict[type, Callable[[_Turn, str, Any], None]]] = {
    Status: _Turn.on_status,
    Claim: _Turn.on_claim,
    Grant: _Turn.on_grant,
    Refuse: _Turn.on_refuse,
    Lead: _Turn.on_lead,
    Ack: _Turn.on_ack,
    Nack: _Turn.on_nack,
    Tell: _Turn.on_tell,
    Resign: _Turn.on_resign,
}
