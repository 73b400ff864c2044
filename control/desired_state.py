"""This node's copy of the desired state: its file, its messages, and a leader's way to change it.

The rule is in ``desired_sync``, the document in ``desired``; the process that owns this one is
``scheduler``. A change counts when a quorum has it on disk: on a machine alone at once.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bridge.show import show
from bridge.term import Term
from control import desired_sync as sync
from control.desired import Desired, body_term, desired_of, read_disk, write_disk
from control.load_options import BadOption
from control.quorum import Roster

log = logging.getLogger("control.desired")

Done = Callable[[bool], None]


class DesiredState:
    """The document and what hangs on it.

    Args:
        node: name of this one.
        path: of the file.
        send: gives a message to the same part of other nodes.
        on_ready: this leader knows what was committed before its epoch.
        on_safe: a quorum of the roster with this stamp has the document.
        on_keys: the API keys of the document may be others now.

    Attributes:
        now: the document; on a leader with its changes that are under way.
    """

    def __init__(
        self,
        node: str,
        path: Path,
        *,
        send: Callable[[Sequence[str], Term], None],
        on_ready: Callable[[], None],
        on_safe: Callable[[sync.Stamp], None],
        on_keys: Callable[[], None],
    ) -> None:
        self._path, self._send = path, send
        self._on_ready, self._on_safe, self._on_keys = on_ready, on_safe, on_keys
        self._state = sync.State(node)
        self._refs = itertools.count(1)
        self._waiting: dict[Term, Done] = {}
        self._on_disk = True
        self._told_bad = False
        self.now = Desired()
        self._told_keys = (self.now.keys, self.now.revoked)

    @property
    def ready(self) -> bool:
        """Whether this node leads and may write."""
        part = self._state.leading
        return part is not None and part.ready

    @property
    def busy(self) -> bool:
        """Whether a change is under way."""
        return bool(self._waiting)

    @property
    def document(self) -> sync.Document:
        """What is on this node's disk."""
        return self._state.disk.document

    def read(self) -> None:
        """Take what the file says. Raises BadDesired."""
        disk = read_disk(self._path)
        self._state = sync.State(self._state.node, disk)
        self.now = desired_of(disk.document)
        self._told_keys = (self.now.keys, self.now.revoked)
        self._on_keys()

    def save(self, desired: Desired, done: Done | None = None) -> None:
        """Make ``desired``, which was made from ``now``, the document of the cluster.

        Args:
            done: told True when it outlives every minority; False when this node leads no more:
                it may have become the document or not.
        """
        part = self._state.leading
        if part is None or not part.ready:
            if done is not None:
                done(False)
            return
        base, ref = (part.epoch, self.now.version), next(self._refs)
        self.now = desired
        self._waiting[ref] = done or _nobody
        self._step(sync.Write(base, body_term(desired), ref))

    def lead(self, epoch: int, roster: Roster) -> None:
        """This node has authority, or has it under another roster."""
        self._step(sync.Leads(epoch, roster))

    def follow(self) -> None:
        """It leads no more."""
        self._step(sync.Follows())

    def node_up(self, node: str) -> None:
        self._step(sync.NodeUp(node))

    def node_down(self, node: str) -> None:
        self._step(sync.NodeDown(node))

    def tick(self) -> None:
        """About once a second: what went unanswered goes again."""
        if not self._on_disk:
            self._write(self._state.disk)
        if self._state.leading is not None:
            self._step(sync.Tick())

    def hear(self, sender: str, term: Any, *, leader: str, epoch: int) -> None:
        """What ``sender`` says, while this node's election follows ``leader`` of ``epoch``."""
        try:
            message = sync.message_of(term)
            if isinstance(message, sync.Put | sync.Have):
                desired_of(message.document)
        except (ValueError, BadOption) as exc:
            if not self._told_bad:  # it comes again every second
                log.error("%s sent %s", sender, show(str(exc), 300))
                self._told_bad = True
            return
        from_leader = isinstance(message, sync.Read | sync.Put)
        if from_leader and (sender, message.epoch) != (leader, epoch):
            return  # an older one, or one that this node has yet to hear of: it comes again
        self._step(sync.Heard(sender, message))

    # -- carrying out ----------------------------------------------------------------------

    def _step(self, event: sync.Event) -> None:
        before = self._told_keys
        self._state, actions = sync.step(self._state, event)
        calls: list[Callable[[], None]] = []
        for action in actions:
            match action:
                case sync.Save(disk):
                    self._write(disk)
                case sync.Send(to, message) if self._on_disk:
                    self._send(to, sync.message_term(message))
                case sync.Adopted(document) if not self._waiting:
                    self.now = desired_of(document)
                case sync.Ready():
                    calls.append(self._on_ready)
                case sync.Safe(stamp):
                    calls.append(lambda stamp=stamp: self._on_safe(stamp))  # type: ignore[misc]
                case sync.Committed(_, ref):
                    calls.append(self._end(ref, True))
                case sync.Failed(ref):
                    calls.append(self._end(ref, False))
        if not self._waiting:
            self.now = desired_of(self._state.disk.document)
        self._told_keys = (self.now.keys, self.now.revoked)
        if self._told_keys != before:
            self._on_keys()
        for call in calls:  # last: each may write again
            call()

    def _end(self, ref: Term, committed: bool) -> Callable[[], None]:
        done = self._waiting.pop(ref)
        return lambda: done(committed)

    def _write(self, disk: sync.Disk) -> None:
        """Until the disk takes it, other machines are told nothing that this one has not kept."""
        try:
            write_disk(self._path, disk)
        except OSError as exc:
            if self._on_disk:
                log.error("cannot write %s: %s; the change is lost at a restart", self._path, exc)
            self._on_disk = False
        else:
            self._on_disk = True


def _nobody(_committed: bool) -> None:
    pass
