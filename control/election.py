"""The registered process ``election``: who leads, since which epoch, and who may place.

The rule is in ``election_rule``; this is the process around it: its disk, its clock, its messages.

======================================  ======================================================
call ``leader``                         ``{ok, Node}``, or ``{error, no_leader}``
call ``epoch``                          newest epoch that this node agreed to
call ``authority``                      ``{ok, Epoch, ForS, Roster}``: this node may place for
                                        ``ForS`` seconds more; or ``{error, no_authority, Text}``
call ``{obey, Node, Epoch}``            ``ok``, or ``{error, old_epoch, Text}``: whether a
                                        command that Node sent as leader of Epoch may be obeyed
cast ``leadership``                     the local ``scheduler`` is told again who leads
cast ``{commands_seen, N}``             the cluster has seen N commands: the version of the
                                        desired state, which grows by one with each
cast ``{documents_safe, {E, N}}``       a quorum of the roster with this stamp has the desired
                                        state on disk: its change may be finished
``{node_up, Node}``                     ``membership``: another node of the cluster is there
``{node_down, Node}``                   ``membership``: it is gone
``{election, Message}``                 from ``{election, Node}`` of another node
======================================  ======================================================

``leader`` is the winner of the last round, so that a side without a majority has one too; only
``authority`` allows to place. Each change is published as the event ``leader`` (``events``) and
told to the local ``scheduler`` as ``{leadership, Leader, Epoch, IsSure, Roster}``.

On disk: ``epoch`` (the newest epoch, and to whom it was given) and ``roster.json`` beside it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bridge.gen_server import GenServer
from bridge.process import Process
from bridge.term import Atom, Term
from control import election_rule as rule
from control.election_messages import BadMessage, message_of, message_term
from control.election_state import (
    Action,
    Changed,
    CommandsSeen,
    DocumentsSafe,
    Event,
    Heard,
    Leave,
    Limits,
    NodeDown,
    NodeUp,
    Promise,
    Save,
    Send,
    State,
    Tick,
    authority,
    fence,
    initial,
    why_none,
)
from control.events import publish
from control.quorum import Roster, alone, configured, roster_term

log = logging.getLogger("control.election")

TICK_S: Final = 0.25
_OK, _ERROR, _ELECTION = Atom("ok"), Atom("error"), Atom("election")


def clock_s() -> float:
    """Seconds that also pass while the machine sleeps, where the system has such a clock."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


class Election(GenServer):
    """One node's part in elections. A machine alone has elected itself when it has started.

    Args:
        epoch_path: file with the newest epoch.
        candidate: this machine has the coordinator role.
        machines: node names of the configuration, this one among them; empty where none is
            configured.
        tie_breaker: node whose half of the machines is enough; empty for the default.
        gated: a change of the agreed membership waits for ``documents_safe``.
        clock: seconds of this machine, for leases.
    """

    def __init__(
        self,
        epoch_path: Path,
        *,
        candidate: bool,
        machines: Sequence[str] = (),
        tie_breaker: str = "",
        limits: Limits | None = None,
        gated: bool = True,
        clock: Callable[[], float] = clock_s,
    ) -> None:
        super().__init__()
        self._path, self._candidate, self._machines = epoch_path, candidate, machines
        self._tie_breaker, self._limits, self._gated = tie_breaker, limits, gated
        self._clock = clock
        self._state: State | None = None
        self._on_disk = True

    def format_state(self) -> Term:
        if self._state is None:
            return Atom("starting")
        s = self._state
        return {
            Atom("leader"): Atom(s.leader or "undefined"),
            Atom("head"): Atom(s.head or "undefined"),
            Atom("epoch"): s.promise.epoch,
            Atom("authority"): authority(s, self._clock()) is not None,
            Atom("clock"): s.clock,
            Atom("seniority"): s.seniority,
            Atom("commands_seen"): s.commands,
            Atom("up"): [Atom(n) for n in sorted(s.up)],
            Atom("members"): [Atom(n) for n in s.roster.members],
            Atom("members_before"): [Atom(n) for n in s.roster.old_members],
            Atom("tie_breaker"): Atom(s.roster.tie_breaker or "undefined"),
        }

    async def init(self, me: Process) -> None:
        me.trap_exit = True  # terminate must resign
        node, now_s = str(me.node.name), self._clock()
        self._disk = ElectionFiles(self._path)
        stored = self._disk.roster()
        roster = stored or alone(node, secrets.token_hex(4))
        if self._machines:
            roster = configured(self._machines, self._tie_breaker)
        elif roster.fixed and node in roster.members:  # a configuration that is gone
            roster = alone(node, secrets.token_hex(4))
        self._state = initial(
            node,
            candidate=self._candidate,
            roster=roster,
            promise=self._disk.promise(node),
            now_s=now_s,
            limits=self._limits,
            tie_breaker=self._tie_breaker,
            gated=self._gated,
        )
        self._on_disk = self._disk.save(self._state.promise, roster)
        self._do(*rule.begin(self._state, now_s))
        self._tick_later()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        s, now_s = self.state, self._clock()
        match request:
            case "leader":
                leader = s.leader or s.head
                return (_OK, Atom(leader)) if leader else (_ERROR, Atom("no_leader"))
            case "epoch":
                return s.promise.epoch
            case "authority":
                right = authority(s, now_s)
                if right is None:
                    return (_ERROR, Atom("no_authority"), why_none(s, now_s))
                return (_OK, right.epoch, right.until_s - now_s, roster_term(s.roster))
            case ("obey", str(leader), int(epoch)):
                if fence(s.promise.epoch, epoch):
                    return _OK
                text = f"epoch {epoch} of {leader} is over: this node is in {s.promise.epoch}"
                return (_ERROR, Atom("old_epoch"), text)
            case _:
                return await super().handle_call(request, from_)

    async def handle_cast(self, message: Term) -> None:
        match message:
            case "leadership":
                s = self.state
                self._tell_scheduler(Changed(s.leader, s.leading or s.promise.epoch, s.sure))
            case ("commands_seen", int(commands)):
                self._take(CommandsSeen(commands))
            case ("documents_safe", (int(epoch), int(number))):
                self._take(DocumentsSafe((epoch, number)))
            case _:
                await super().handle_cast(message)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("tick",):
                if not self._on_disk:
                    self._on_disk = self._disk.save(self.state.promise, self.state.roster)
                self._take(Tick())
                self._tick_later()
            case ("node_up", str(node)) if node != self.state.node:
                self._take(NodeUp(str(node)))
            case ("node_down", str(node)):
                self._take(NodeDown(str(node)))
            case ("election", str(sender), term):
                try:
                    heard = Heard(str(sender), message_of(term))
                except BadMessage as exc:
                    log.warning("%s sent %s", sender, exc)
                    return
                self._take(heard)
            case _:
                await super().handle_info(message)

    async def terminate(self, reason: Term) -> None:
        if self._state is not None:
            self._take(Leave())

    @property
    def state(self) -> State:
        assert self._state is not None, "init comes first"
        return self._state

    def _tick_later(self) -> None:
        self.me.send_after(TICK_S, self.me.pid, (Atom("tick"),))

    def _take(self, event: Event) -> None:
        self._do(*rule.step(self.state, event, self._clock()))

    def _do(self, state: State, actions: tuple[Action, ...]) -> None:
        """Carry out ``actions`` in their order; nothing is told that should be on disk and is not.

        So a full disk costs a machine its say in the cluster, but does not stop it alone.
        """
        before, self._state = self._state, state
        for action in actions:
            match action:
                case Send(to, message) if self._on_disk:
                    term = (_ELECTION, self.me.node.name, message_term(message))
                    for node in to:
                        self.me.send((_ELECTION, Atom(node)), term)
                case Save(promise, roster):
                    self._on_disk = self._disk.save(promise, roster)
                case Changed():
                    self._tell(action)
        if before is None or state.roster == before.roster:
            return
        if state.sure:
            self._tell(Changed(state.leader, state.leading, state.sure))
        elif state.roster.lineage != before.roster.lineage:  # this node is of another cluster now
            self._tell_scheduler(Changed(state.leader, state.promise.epoch, state.sure))

    def _tell(self, change: Changed) -> None:
        leader = Atom(change.leader or "undefined")
        log.info("leader %s, epoch %d, authority %s", leader, change.epoch, change.authority)
        publish(
            self.me,
            "leader",
            {
                Atom("leader"): leader,
                Atom("epoch"): change.epoch,
                Atom("authority"): change.authority,
            },
        )
        self._tell_scheduler(change)

    def _tell_scheduler(self, change: Changed) -> None:
        leader, roster = Atom(change.leader or "undefined"), roster_term(self.state.roster)
        told = (Atom("leadership"), leader, change.epoch, change.authority, roster)
        self.me.send(Atom("scheduler"), told)


class ElectionFiles:
    """What an election must not forget.

    Args:
        path: of the epoch; the roster is beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._roster_path = path, path.with_name("roster.json")
        self._roster: Roster | None = None
        self._promise = Promise()

    def promise(self, node: str) -> Promise:
        """The newest epoch and its owner, which is ``node`` where the file does not say."""
        try:
            epoch, _, holder = self._path.read_text().strip().partition("\n")
            self._promise = Promise(int(epoch), holder or node)
        except FileNotFoundError:
            self._promise = Promise()
        except (OSError, ValueError) as exc:
            log.error("%s does not hold a number (%s); elections start at epoch 1", self._path, exc)
            self._promise = Promise()
        return self._promise

    def roster(self) -> Roster | None:
        """The last roster; None where there is none."""
        try:
            raw = json.loads(self._roster_path.read_text())
            self._roster = Roster(
                lineage=str(raw["lineage"]),
                stamp=(int(raw["stamp"][0]), int(raw["stamp"][1])),
                members=tuple(map(str, raw["members"])),
                tie_breaker=str(raw["tie_breaker"]),
                old_members=tuple(map(str, raw["old_members"])),
                old_tie_breaker=str(raw["old_tie_breaker"]),
            )
        except FileNotFoundError:
            self._roster = None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as exc:
            log.error(
                "cannot read %s (%s: %s); this machine is a cluster of its own until it meets one",
                self._roster_path,
                type(exc).__name__,
                exc,
            )
            self._roster = None
        return self._roster

    def save(self, promise: Promise, roster: Roster) -> bool:
        """Have both on the disk when this returns; False where the disk does not take them."""
        if promise != self._promise:
            if not self._write(self._path, f"{promise.epoch}\n{promise.holder}\n"):
                return False
            self._promise = promise
        if roster != self._roster:
            if not self._write(self._roster_path, json.dumps(asdict(roster), indent=1)):
                return False
            self._roster = roster
        return True

    def _write(self, path: Path, text: str) -> bool:
        temporary = path.with_suffix(".new")
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as exc:  # a full disk must not cost the node
            log.error("cannot write %s: %s; this machine has no say until it can", path, exc)
            return False
        return True
