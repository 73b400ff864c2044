"""One other node as this node knows it: the links and monitors that cross to it, and what its
messages do here.

Each side's book is filled before anything is sent, so that a lost connection, or one that could
never be made, gives every owner its ``noconnection``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from bridge.control_messages import (
    Demonitor,
    ExitSignal,
    GroupLeader,
    Link,
    LinkExit,
    Message,
    Monitor,
    MonitorDown,
    Send,
    SendAlias,
    SendName,
    SpawnReply,
    SpawnRequest,
    Unlink,
    UnlinkAck,
)
from bridge.errors import EncodeError
from bridge.exit_signals import NOCONNECTION, NOPROC, nodedown_message
from bridge.process import Monitor as Held
from bridge.term import Atom, Pid, Ref, Term

if TYPE_CHECKING:
    from bridge.node import Node
    from bridge.process import Process

_log: Final = logging.getLogger("bridge.peer")

MAX_QUEUED: Final = 100_000  # messages kept while a connection is being made


class Channel(Protocol):
    """An established connection, as a peer uses it."""

    def send(self, message: Message) -> None:
        """Write a message. Raises EncodeError."""


Spawner = Callable[["Peer", SpawnRequest], None]


class Peer:
    """The signals between this node and ``name``."""

    def __init__(self, node: Node, name: str, spawner: Spawner) -> None:
        self.name: Final = Atom(name)
        self.channel: Channel | None = None
        self.node = node
        self._spawner = spawner
        self._queue: list[Message] = []
        self._links: set[tuple[Process, Pid]] = set()
        self._monitors: dict[Ref, Process] = {}  # held here, watching there
        self._watched: dict[Ref, Process] = {}  # watched from there
        self._node_watchers: set[Process] = set()

    # --- outwards

    def send(self, message: Message) -> None:
        """Write a message, or keep it until the connection is there. Raises EncodeError."""
        if self.channel is not None:
            self.channel.send(message)
        elif len(self._queue) < MAX_QUEUED:
            self._queue.append(message)

    def link(self, process: Process, to: Pid) -> None:
        """Note a link and tell the other end."""
        self._links.add((process, to))
        self.send(Link(process.pid, to))

    def unlink(self, process: Process, to: Pid, unlink_id: int) -> None:
        """Tell the other end; the link stays in the book until it confirms."""
        self.send(Unlink(unlink_id, process.pid, to))

    def link_exit(self, process: Process, to: Pid, reason: Term) -> None:
        """A local process with a link to ``to`` ended."""
        self._links.discard((process, to))
        self._send_reason(LinkExit(process.pid, to, reason))

    def monitor(self, process: Process, ref: Ref, target: Pid | tuple[str, str]) -> None:
        """Note a monitor and tell the other end."""
        self._monitors[ref] = process
        self.send(Monitor(process.pid, _target(target), ref))

    def demonitor(self, process: Process, ref: Ref, target: Pid | tuple[str, str]) -> None:
        """Forget a monitor and tell the other end."""
        if self._monitors.pop(ref, None) is not None:
            self.send(Demonitor(process.pid, _target(target), ref))

    def spawn(
        self, process: Process, ref: Ref, module: str, function: str, arguments: list[Term]
    ) -> None:
        """Note a monitor and ask for a process to watch with it."""
        self._monitors[ref] = process
        leader = process.group_leader or process.pid
        mfa = (Atom(module), Atom(function), arguments)
        self.send(SpawnRequest(ref, process.pid, leader, *mfa, [Atom("monitor")]))

    def down(self, watcher: Pid, ref: Ref, target: Term, reason: Term) -> None:
        """A local process watched from there ended."""
        if self._watched.pop(ref, None) is not None:
            self._send_reason(MonitorDown(target, watcher, ref, reason))

    def _send_reason(self, message: LinkExit | MonitorDown) -> None:
        """The end of a process must get through, whatever it died of."""
        try:
            self.send(message)
        except EncodeError:
            text = repr(message.reason)[:2000].encode("utf-8", "replace")
            self.send(replace(message, reason=(Atom("unencodable"), text)))

    def watch_node(self, process: Process) -> None:
        """Tell ``process`` when the connection is lost."""
        self._node_watchers.add(process)

    def forget(self, process: Process) -> None:
        """``process`` ended: drop what it no longer needs to hear."""
        self._node_watchers.discard(process)
        self._links = {link for link in self._links if link[0] is not process}

    # --- the connection comes and goes

    def up(self, channel: Channel) -> None:
        """The connection is made: send what has been waiting."""
        self.channel = channel
        queue, self._queue = self._queue, []
        for message in queue:
            try:
                channel.send(message)
            except EncodeError as exc:
                _log.error("a message to %s is dropped: %s", self.name, exc)

    def lost(self) -> None:
        """The connection is gone, or could not be made."""
        self.channel = None
        self._queue.clear()
        links, self._links = self._links, set()
        monitors, self._monitors = self._monitors, {}
        watched, self._watched = self._watched, {}
        watchers, self._node_watchers = self._node_watchers, set()
        for ref, process in watched.items():
            process.monitored_by.pop(ref, None)
        for process, pid in links:
            self.node.link_broken(process, pid, NOCONNECTION)
        for ref, process in monitors.items():
            self.node.monitor_fired(process, ref, NOCONNECTION)
        for process in watchers:
            for _ in range(process.watched_nodes.pop(self.name, 0)):
                process.mailbox.put(nodedown_message(self.name))

    # --- inwards

    def receive(self, message: Message, *, at_once: bool = False) -> None:
        """Do what a message of this peer asks for.

        Args:
            at_once: let a process that waits for it go on in this call; no task may be running.
        """
        node = self.node
        # Nearly all messages are these, and `match` is slow.
        if type(message) is SendName:
            process = node.named(message.to)
            if process is not None:
                process.mailbox.put(message.message, at_once=at_once)
            return
        if type(message) is Send:
            process = node.process(message.to)
            if process is not None:
                process.mailbox.put(message.message, at_once=at_once)
            return
        if type(message) is SendAlias:
            node.send_to_alias(message.to, message.message)
            return
        match message:
            case Monitor():
                self._monitored(message)
            case Demonitor(_, _, ref):
                process = self._watched.pop(ref, None)
                if process is not None:
                    process.monitored_by.pop(ref, None)
            case MonitorDown(_, to, ref, reason):
                process = self._monitors.pop(ref, None)
                if process is not None and process.pid == to:
                    node.monitor_fired(process, ref, reason)
            case Link():
                self._linked(message)
            case LinkExit(sender, to, reason):
                process = node.process(to)
                if process is not None:
                    self._links.discard((process, sender))
                    node.link_broken(process, sender, reason)
            case Unlink(unlink_id, sender, to):
                process = node.process(to)
                if process is not None and process.links.get(sender) == 0:
                    del process.links[sender]
                    self._links.discard((process, sender))
                self.send(UnlinkAck(unlink_id, to, sender))
            case UnlinkAck(unlink_id, sender, to):
                process = node.process(to)
                if process is not None and process.links.get(sender) == unlink_id:
                    del process.links[sender]
                    self._links.discard((process, sender))
            case ExitSignal(sender, to, reason):
                process = node.find(to)
                if process is not None:
                    node.exit(sender, process.pid, reason)
            case SpawnRequest():
                self._spawner(self, message)
            case GroupLeader(sender, to):
                process = node.process(to)
                if process is not None:
                    process.group_leader = sender
            case SpawnReply(ref, to, _, _, result):
                process = self._monitors.get(ref)
                if process is None or process.pid != to:
                    return
                if ref not in process.monitors:  # nobody waits for it any more
                    del self._monitors[ref]
                    if isinstance(result, Pid):
                        self.send(Demonitor(to, result, ref))
                elif isinstance(result, Pid):
                    process.monitors[ref] = Held(result, None)
                else:
                    del self._monitors[ref]
                    node.monitor_fired(process, ref, result)

    def watched(self, process: Process, watcher: Pid, ref: Ref, target: Pid | Atom) -> None:
        """``watcher`` of this peer watches a local process."""
        process.monitored_by[ref] = (watcher, target)
        self._watched[ref] = process

    def linked(self, process: Process, other: Pid) -> None:
        """``other`` of this peer is linked to a local process."""
        process.links[other] = 0
        self._links.add((process, other))

    def _monitored(self, message: Monitor) -> None:
        process = self.node.find(message.to)
        if process is None:
            self.send(MonitorDown(message.to, message.sender, message.ref, NOPROC))
        elif message.sender.node == self.name:
            self.watched(process, message.sender, message.ref, message.to)

    def _linked(self, message: Link) -> None:
        process = self.node.process(message.to)
        if process is None:
            self.send(LinkExit(message.to, message.sender, NOPROC))
        elif message.sender.node == self.name and message.sender not in process.links:
            # One that is being unlinked stays so: the other end gets our unlink after its link.
            self.linked(process, message.sender)


def _target(target: Pid | tuple[str, str]) -> Pid | Atom:
    return target if isinstance(target, Pid) else Atom(target[0])
