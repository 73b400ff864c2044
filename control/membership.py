"""The registered process ``membership``: which machines the cluster has and what they offer.

=================================  ===============================================================
call ``nodes``                     list of maps as in CONTRACT section 3; machines that are down
                                   stay in it for a while; ``why`` says what happened to them
call ``up``                        names of the other nodes that are up
call ``{tell, Map}``               ``ok``: keys that others get to know with this machine's facts
call ``{subscribe, Pid}``          ``{ok, Nodes}``: who is up now; then ``{node_up, Node}`` and
                                   ``{node_down, Node}`` until the subscriber ends
``{hello | beat | ask | known |    from the ``membership`` of another node; each begins with the
leaving | refuse, Pid, ...}``      pid of its sender
=================================  ===============================================================

Nodes that get connected say hello (``hello``); who passes is a machine of the cluster, and beats
once a second (``membership_rule``). ``election`` is sent ``{node_up, Node}`` and ``{node_down,
Node}`` besides, and is told again who is up when it was restarted. One machine is a cluster; until
the first connection nothing is sent and no thread runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control import membership_rule as rule
from control.beats import BeatThread, last_sign_s
from control.discovery.candidates import Address, Identity
from control.events import publish_here
from control.hello import Hello, addresses_of, addresses_term, hello_of, hello_term, judge
from control.machine import Machine, differs
from control.meeting import Reach, reaches_term
from control.members import LEFT, Member, remarks, row, thread_targets

_log: Final = logging.getLogger("control.membership")

SHOW_DOWN_S: Final = 600.0  # how long a machine that is down is listed
_NAME: Final = "membership"
_LIMITS: Final = rule.Limits()


class Membership(GenServer):
    """Keeps the list of machines.

    Args:
        read: measures this machine; passed in, so that tests choose the figures.
        roles: what this machine may do: compute, coordinator, storage.
        identity: this node, its cluster, version and secret.
        addresses: where its distribution listens, once it does.
        reaches: what others are told of these addresses.
        limits: of beats and silence.
    """

    def __init__(
        self,
        read: Callable[[], Machine],
        roles: tuple[str, ...],
        *,
        identity: Identity,
        addresses: Callable[[], tuple[Address, ...]] = tuple,
        reaches: Callable[[], tuple[Reach, ...]] = tuple,
        limits: rule.Limits = _LIMITS,
    ) -> None:
        super().__init__()
        self._read, self.roles, self._identity = read, roles, identity
        self._addresses, self._reaches, self._limits = addresses, reaches, limits
        self._more: dict[Any, Term] = {}  # facts that other servers of this node found out
        self._has_news = False
        self._reached: list[Term] = []
        self._members: dict[str, Member] = {}
        self._connected: set[str] = set()  # visible nodes, of ours or not
        self._subscribers: dict[Ref, Pid] = {}
        self._election: Pid | None = None
        self._facts_version = 0
        self._thread: BeatThread | None = None

    def format_state(self) -> Term:
        return {
            Atom("roles"): [Atom(r) for r in self.roles],
            Atom("cluster"): self._identity.cluster,
            Atom("up"): [Atom(n) for n in self._up()],
            Atom("subscribers"): list(self._subscribers.values()),
        }

    async def init(self, me: Process) -> None:
        me.trap_exit = True  # terminate must say that we leave
        self._incarnation = time.time_ns() // 1_000_000
        self._told = self._read()
        self._checked_s = self._beaten_s = self._now_s()
        self._tick_later()

    async def terminate(self, reason: Term) -> None:
        for node in self._up():
            self._tell(node, (Atom("leaving"), self.me.pid))
        if self._thread is not None:
            self._thread.stop()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "nodes":
                return self._rows()
            case "up":
                return [Atom(node) for node in self._up()]
            case ("tell", dict(more)):
                self._more |= more
                self._has_news = True  # goes with the next beat
                return Atom("ok")
            case ("subscribe", Pid() as pid):
                self._subscribers[self.me.monitor(pid)] = pid
                return (Atom("ok"), [Atom(node) for node in self._up()])
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("tick",):
                self._tick_later()
                self._tick()
            case ("nodedown", str(node)):
                self._disconnected(str(node))
            case ("DOWN", Ref() as monitor, _, _, _):
                self._subscribers.pop(monitor, None)
            case (str(), Pid() as sender, *_) if sender.node != self.me.node.name:
                try:
                    self._hear(sender, message)
                except (ValueError, TypeError) as exc:
                    _log.warning("%s says what is not understood: %s", sender.node, exc)
            case _:
                await super().handle_info(message)

    # -- time ------------------------------------------------------------------------------

    def _tick_later(self) -> None:
        self.me.send_after(self._limits.check_s, self.me.pid, (Atom("tick"),))

    def _tick(self) -> None:
        now_s = self._now_s()
        if self._thread is not None:
            self._thread.on_time()
        self._greet_new()
        for node, member in list(self._members.items()):
            if member.peer is not None and member.peer.up:
                heard_s = member.peer.heard_s
                if self._thread is not None:
                    heard_s = last_sign_s(heard_s, self._thread.heard_s(node))
                seen = replace(member.peer, heard_s=heard_s)
                actions = rule.check(seen, now_s, self._checked_s, self._limits)
                if actions:
                    member.peer = None  # it is cut whatever comes
                    self._act(node, actions)
            elif not member.up and now_s - member.since_s > SHOW_DOWN_S:
                del self._members[node]
        self._checked_s = now_s
        if now_s - self._beaten_s >= self._limits.beat_s - self._limits.check_s / 2:
            self._beaten_s = now_s
            self._beat()
        election = self.me.node.whereis("election")
        if election is not None and election != self._election:
            self._election = election
            for node in self._up():
                self.me.send(election, (Atom("node_up"), Atom(node)))

    def _beat(self) -> None:
        up = self._up()
        if not up:
            return
        machine, facts = self._read(), None
        if self._has_news or differs(self._told, machine):
            self._told, self._has_news = machine, False
            self._facts_version += 1
            facts = self._facts()
        beat = rule.Beat(self._incarnation, self._facts_version, facts)
        for node in up:
            self._tell(node, (Atom("beat"), self.me.pid, rule.beat_term(beat)))

    # -- connections -----------------------------------------------------------------------

    def _greet_new(self) -> None:
        for node in self.me.node.nodes():
            if node not in self._connected:
                self._watch(node)
                self._say_hello(node, answer=False)

    def _watch(self, node: str) -> None:
        if node not in self._connected:
            self._connected.add(str(node))
            self.me.monitor_node(node)

    def _say_hello(self, node: str, *, answer: bool) -> None:
        if self._thread is None:
            self._thread = BeatThread(
                self._identity.node,
                self._identity.cookie,
                host=self._beat_host(),
                incarnation=self._incarnation,
            )
            self._thread.start()
        self._tell(node, hello_term(self._hello(answer=answer)))

    def _hello(self, *, answer: bool) -> Hello:
        return Hello(
            pid=self.me.pid,
            cluster=self._identity.cluster,
            version=self._identity.version,
            incarnation=self._incarnation,
            beat_port=self._thread.port if self._thread is not None else 0,
            addresses=self._addresses(),
            facts_version=self._facts_version,
            facts=self._facts(),
            clock_s=time.time(),
            answer=answer,
        )

    def _beat_host(self) -> str:
        addresses = self._addresses()
        return addresses[0].host if addresses else self._identity.node.partition("@")[2]

    def _disconnected(self, node: str) -> None:
        self._connected.discard(node)
        member = self._members.get(node)
        if member is not None and member.peer is not None:
            peer, member.peer = member.peer, None
            self._act(node, rule.disconnected(peer))

    # -- what others say -------------------------------------------------------------------

    def _hear(self, sender: Pid, message: Any) -> None:
        """Raises ValueError for what is not understood."""
        node = str(sender.node)
        member = self._members.get(node)
        match message:
            case ("hello", _, dict(data)):
                self._welcome(node, hello_of(sender, data))
            case ("refuse", _, why):
                self._refused(node, f"it refuses us: {text_of(why)}")
            case ("beat", _, term):
                beat = rule.beat_of(term)
                if member is None or member.peer is None or member.refused:
                    self._say_hello(node, answer=False)  # it knows us; we were restarted
                    return
                member.peer, actions = rule.on_beat(member.peer, beat, self._now_s())
                self._act(node, actions)
            case ("ask", _):
                beat = rule.Beat(self._incarnation, self._facts_version, self._facts())
                self._tell(node, (Atom("beat"), self.me.pid, rule.beat_term(beat)))
            case ("known", _, [*others]):
                for other, addresses in others:
                    self._tell_discovery(str(other), addresses_of(addresses))
            case ("leaving", _):
                if member is not None and member.up:
                    member.peer = None
                    self._act(node, (rule.Down(LEFT),))
            case _:
                raise ValueError(show(message))

    def _welcome(self, node: str, hello: Hello) -> None:
        """Let ``node`` in, or say why not."""
        if node not in self.me.node.nodes():
            return  # it was cut while this waited
        self._watch(node)
        mine = self._hello(answer=True)
        verdict = judge(mine, hello)
        if verdict.refuse:
            self._tell(node, (Atom("refuse"), self.me.pid, _mirrored(hello, mine)))
            self._refused(node, verdict.refuse)
            return
        if not hello.answer:
            self._say_hello(node, answer=True)
        now_s = self._now_s()
        member = self._members.get(node)
        if member is None or member.refused:
            member = self._members[node] = Member(None, {}, now_s)
        member.hello = hello
        member.clock_ahead_s = round(hello.clock_s - time.time(), 1)
        if verdict.note and verdict.note != member.note:
            _log.warning("%s: %s", node, verdict.note)
        member.note = verdict.note
        peer = member.peer or rule.connected(now_s)
        beat = rule.Beat(hello.incarnation, hello.facts_version, hello.facts)
        member.peer, actions = rule.on_beat(peer, beat, now_s)
        self._act(node, actions)

    def _refused(self, node: str, why: str) -> None:
        member = self._members.get(node)
        if member is None or member.refused != why:
            _log.warning("%s is not joined: %s", node, why)
        if member is not None and member.up:
            member.peer = None
            self._act(node, (rule.Down(why),))
        self._members[node] = Member(None, {}, self._now_s(), why=why, refused=why)
        gen_server.cast(self.me, Atom("discovery"), (Atom("refused"), Atom(node), why))
        self.me.node.disconnect(node)

    # -- what follows ----------------------------------------------------------------------

    def _act(self, node: str, actions: tuple[rule.Action, ...]) -> None:
        member = self._members[node]
        for action in actions:
            match action:
                case rule.Up():
                    self._node_up(node, member)
                case rule.Down(why):
                    self._node_down(node, member, why)
                case rule.NewFacts(facts) if isinstance(facts, dict):
                    member.facts = facts
                case rule.NewFacts():
                    _log.warning("the facts of %s are no map: %s", node, show(action.facts))
                case rule.AskFacts():
                    self._tell(node, (Atom("ask"), self.me.pid))
                case rule.Cut():
                    self.me.node.disconnect(node)

    def _node_up(self, node: str, member: Member) -> None:
        assert member.hello is not None
        member.since_s, member.why = self._now_s(), ""
        _log.info("%s has joined", node)
        self._notify("node_up", node)
        self._set_thread_peers(also=member.hello)
        publish_here(self.me, "node_up", {Atom("node"): Atom(node), Atom("note"): member.note})
        self._tell_discovery(node, member.hello.addresses)
        known: list[Term] = [
            (Atom(other), addresses_term(known.hello.addresses))
            for other, known in self._members.items()
            if other != node and known.up and known.hello is not None
        ]
        self._tell(node, (Atom("known"), self.me.pid, known))

    def _node_down(self, node: str, member: Member, why: str) -> None:
        member.since_s, member.why = self._now_s(), why
        _log.warning("%s is down: %s", node, why)
        self._notify("node_down", node)
        self._set_thread_peers()
        publish_here(self.me, "node_down", {Atom("node"): Atom(node), Atom("why"): why})

    def _notify(self, what: str, node: str) -> None:
        message = (Atom(what), Atom(node))
        gen_server.cast(self.me, Atom("events"), message)
        election = self.me.node.whereis("election")
        if election is not None and election == self._election:
            self.me.send(election, message)
        for pid in self._subscribers.values():
            self.me.send(pid, message)

    def _tell_discovery(self, node: str, addresses: tuple[Address, ...]) -> None:
        if node != self.me.node.name and addresses:
            message = (Atom("member"), Atom(node), addresses_term(addresses))
            gen_server.cast(self.me, Atom("discovery"), message)

    def _tell(self, node: str, message: Term) -> None:
        """Nothing is sent, and above all no connection begun, where there is none."""
        if node in self._connected:
            self.me.send((_NAME, node), message)

    def _set_thread_peers(self, also: Hello | None = None) -> None:
        if self._thread is None:
            return
        hellos = [m.hello for m in self._members.values() if m.up and m.hello is not None]
        if also is not None:
            hellos.append(also)
        self._thread.set_peers(thread_targets(self._beat_host(), hellos))

    # -- answers ---------------------------------------------------------------------------

    def _up(self) -> list[str]:
        return sorted(node for node, member in self._members.items() if member.up)

    def _facts(self) -> dict[Any, Term]:
        """This machine, as it was last told to others."""
        if not self._reached:
            self._reached = reaches_term(self._reaches())
        return {
            Atom("roles"): [Atom(r) for r in self.roles],
            **self._told.to_term(),
            Atom("os_pid"): os.getpid(),
            Atom("version"): self._identity.version,
            Atom("addresses"): self._reached,
            Atom("speeds"): [],
            **self._more,
        }

    def _rows(self) -> list[Term]:
        own: dict[Any, Term] = {
            Atom("name"): self.me.node.name,
            Atom("state"): Atom("up"),
            **self._facts(),
            **self._read().to_term(),
            **remarks(),
        }
        return [own, *(row(node, self._members[node]) for node in sorted(self._members))]

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def _mirrored(theirs: Hello, mine: Hello) -> str:
    """The verdict as the other side would put it."""
    return judge(theirs, mine).refuse
