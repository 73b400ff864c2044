"""The processes of one node: pids, names, and what links, monitors and exits do to them.

Signals between local processes take effect before the call returns. What leads elsewhere goes to
the ``Network``. Deaths are worked off from a queue: a chain of links is no recursion.
"""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from bridge import runner
from bridge.exit_signals import (
    NOPROC,
    Deliver,
    Die,
    down_message,
    exit_request,
    link_exit,
)
from bridge.network import Network, NoNetwork
from bridge.process import AliasMode, Body, Dest, Monitor, Process
from bridge.process_errors import Exit, NameRegistered
from bridge.term import Atom, Pid, Ref, Term

if TYPE_CHECKING:
    from bridge.node import Node

_ID_LIMIT: Final = 1 << 28  # what a plain `<0.N.0>` shows; then the serial counts on


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One line of a process list."""

    pid: Pid
    name: Atom | None
    label: str
    mailbox_length: int
    links: tuple[Pid, ...]
    parent: Pid | None


class LocalNode:
    """Everything of a node that needs no network. Use ``bridge.node.Node``."""

    def __init__(self, name: str, creation: int | None) -> None:
        self.name: Final = Atom(name)
        # OTP's range: 0 and 1..3 have old meanings, so that a restart never reuses a creation.
        self.creation: Final = creation or 4 + secrets.randbelow((1 << 32) - 4)
        self.network: Network = NoNetwork(cast("Node", self))
        self._table: dict[Pid, Process] = {}
        self._names: dict[str, Process] = {}
        self._aliases: dict[Ref, tuple[Process, AliasMode]] = {}
        self._next_id = 0
        self._next_ref = 0
        self._next_unlink_id = 0
        self._deaths: deque[tuple[Process, Term]] = deque()
        self._burying = False

    # --- identity

    def make_ref(self) -> Ref:
        """A reference that no other of this node equals."""
        self._next_ref = count = self._next_ref + 1
        # The first word keeps to 18 bits: old peers read no more.
        words = (count & 0x3FFFF, (count >> 18) & 0xFFFFFFFF, count >> 50)
        return Ref(self.name, self.creation, words)

    def _make_pid(self) -> Pid:
        self._next_id = count = self._next_id + 1
        return Pid(self.name, count % _ID_LIMIT, count // _ID_LIMIT, self.creation)

    # --- processes

    def spawn(
        self,
        body: Body,
        *,
        name: str | None = None,
        link_to: Process | None = None,
        label: str = "",
    ) -> Pid:
        """Start a process. Raises NameRegistered."""
        child = self.spawn_process(
            body, parent=link_to, link=link_to is not None, name=name, label=label
        )
        return child.pid

    def spawn_process(
        self,
        body: Body,
        *,
        parent: Process | None = None,
        link: bool = False,
        name: str | None = None,
        label: str = "",
    ) -> Process:
        """Start a process and give its handle. Raises NameRegistered."""
        process = self.open_process(label=label, parent=parent, name=name)
        process.initial_call = (
            str(getattr(body, "__module__", "bridge")),
            str(getattr(body, "__qualname__", type(body).__qualname__)),
            1,
        )
        if link and parent is not None:
            self.link(parent, process.pid)
        runner.start(process, body)
        return process

    def open_process(
        self, *, label: str = "", name: str | None = None, parent: Process | None = None
    ) -> Process:
        """A process without a task, for a plain coroutine: ``with node.open_process() as me:``.

        It ends ``normal`` with the block. After an exit signal that it does not trap its next
        receive raises Exit. Raises NameRegistered.
        """
        if name is not None and name in self._names:
            raise NameRegistered(name, self._names[name].pid)
        process = Process(cast("Node", self), self._make_pid(), label, parent)
        self._table[process.pid] = process
        if name is not None:
            self.register(name, process.pid)
        return process

    def process(self, pid: Pid) -> Process | None:
        """The living local process ``pid``; None also for a pid of an earlier start."""
        return self._table.get(pid)

    def named(self, name: str) -> Process | None:
        """The local process registered as ``name``."""
        return self._names.get(name)

    def find(self, dest: Pid | Ref | Atom) -> Process | None:
        """The living local process behind a pid, an active alias or a name."""
        if isinstance(dest, Ref):
            found = self._aliases.get(dest)
            return found[0] if found else None
        return self._names.get(dest) if isinstance(dest, str) else self._table.get(dest)

    def processes(self) -> list[ProcessInfo]:
        """All living processes, oldest first."""
        return [
            ProcessInfo(p.pid, p.name, p.label, len(p.mailbox), tuple(p.links), p.parent)
            for p in self._table.values()
        ]

    # --- names

    def register(self, name: str, pid: Pid) -> None:
        """Give a local process a name. Raises NameRegistered, or Exit(noproc)."""
        process = self._table.get(pid)
        if process is None:
            raise Exit(NOPROC)
        if name in self._names or process.name is not None:
            raise NameRegistered(name, self._names.get(name, process).pid)
        process.name = Atom(name)
        self._names[process.name] = process

    def unregister(self, name: str) -> None:
        """Take a name away; nothing happens if nobody has it."""
        process = self._names.pop(name, None)
        if process is not None:
            process.name = None

    def whereis(self, name: str) -> Pid | None:
        """Who has this name."""
        process = self._names.get(name)
        return process.pid if process else None

    def registered(self) -> list[Atom]:
        """All names."""
        return [Atom(name) for name in self._names]

    # --- messages

    def send(self, sender: Pid, to: Dest, message: Term) -> None:
        """Deliver a message, or hand it to the network. Never fails."""
        if type(to) is Pid:
            if to.node == self.name:
                process = self._table.get(to)
                if process is not None:
                    process.mailbox.put(message)
            else:
                self.network.send_pid(sender, to, message)
        elif isinstance(to, str):
            process = self._names.get(to)
            if process is not None:
                process.mailbox.put(message)
        elif isinstance(to, Ref):
            if to.node == self.name:
                self.send_to_alias(to, message)
            else:
                self.network.send_alias(sender, to, message)
        else:
            name, node = cast("tuple[str, str]", to)
            if node == self.name:
                self.send(sender, name, message)
            else:
                self.network.send_name(sender, node, name, message)

    def send_to_alias(self, alias: Ref, message: Term) -> None:
        """Deliver to the process behind a local alias, if it is still active."""
        found = self._aliases.get(alias)
        if found is None:
            return
        process, mode = found
        if mode in ("reply", "reply_demonitor"):
            self._end_alias(alias)
            if mode == "reply_demonitor":
                self.demonitor(process, alias)
        process.mailbox.put(message)

    def alias(self, process: Process, mode: AliasMode) -> Ref:
        """Make an alias of ``process``."""
        ref = self.make_ref()
        self._aliases[ref] = (process, mode)
        process.aliases.add(ref)
        return ref

    def _end_alias(self, ref: Ref) -> None:
        process, _ = self._aliases.pop(ref)
        process.aliases.discard(ref)

    def unalias(self, process: Process, alias: Ref) -> bool:
        """Make an alias of ``process`` inactive; whether it was active."""
        found = self._aliases.get(alias)
        if found is None or found[0] is not process:
            return False
        self._end_alias(alias)
        return True

    # --- links

    def link(self, process: Process, to: Pid) -> None:
        """``erlang:link/1`` by ``process``."""
        state = process.links.get(to)
        if to == process.pid or state == 0:
            return
        if to.node != self.name:
            process.links[to] = 0
            self.network.link(process, to)
            return
        other = self._table.get(to)
        if other is None:
            process.links[to] = 0
            self.link_broken(process, to, NOPROC)
        else:
            process.links[to] = 0
            other.links[process.pid] = 0

    def unlink(self, process: Process, to: Pid) -> None:
        """``erlang:unlink/1`` by ``process``."""
        if process.links.get(to) != 0:
            return
        if to.node != self.name:
            # Source: "Link Protocol" of OTP's distribution protocol: inactive until confirmed.
            self._next_unlink_id += 1
            process.links[to] = self._next_unlink_id
            self.network.unlink(process, to, self._next_unlink_id)
            return
        del process.links[to]
        other = self._table.get(to)
        if other is not None:
            other.links.pop(process.pid, None)

    def link_broken(self, process: Process, other: Pid, reason: Term) -> None:
        """The other end of a link ended, or was lost, with ``reason``."""
        if process.links.pop(other, None) == 0:
            self._apply(process, link_exit(other, reason, trapping=process.trap_exit))

    # --- monitors

    def monitor(
        self,
        process: Process,
        dest: Pid | str | tuple[str, str],
        alias: AliasMode | None,
    ) -> Ref:
        """``erlang:monitor(process, dest)`` by ``process``."""
        ref = self.make_ref() if alias is None else self.alias(process, alias)
        if isinstance(dest, Pid):
            target: Term = dest
            here = dest.node == self.name
            other = self._table.get(dest) if here else None
        else:
            name, node = (dest, self.name) if isinstance(dest, str) else dest
            target = (Atom(name), Atom(node))
            here = node == self.name
            other = self._names.get(name) if here else None
        process.monitors[ref] = Monitor(target, other.pid if other else None)
        if not here:
            self.network.monitor(process, ref, target)
        elif other is None:
            self.monitor_fired(process, ref, NOPROC)
        else:
            other.monitored_by[ref] = (process.pid, target)
        return ref

    def demonitor(self, process: Process, ref: Ref) -> bool:
        """``erlang:demonitor/1`` by ``process``; False if the monitor is gone or has fired."""
        self._end_monitor_alias(ref)
        held = process.monitors.pop(ref, None)
        if held is None:
            return False
        if held.pid is not None:
            other = self._table.get(held.pid)
            if other is not None:
                other.monitored_by.pop(ref, None)
        else:
            self.network.demonitor(process, ref, held.target)
        return True

    def monitor_fired(self, process: Process, ref: Ref, reason: Term) -> None:
        """What ``process`` watches under ``ref`` ended, or was lost, with ``reason``."""
        held = process.monitors.pop(ref, None)
        if held is not None:
            self._end_monitor_alias(ref)
            process.mailbox.put(down_message(ref, held.target, reason))

    def _end_monitor_alias(self, ref: Ref) -> None:
        found = self._aliases.get(ref)
        if found is not None and found[1] in ("demonitor", "reply_demonitor"):
            self._end_alias(ref)

    def spawn_monitored(
        self, process: Process, node: str, module: str, function: str, arguments: list[Term]
    ) -> Ref:
        """Have another node run ``module:function``, watched by ``process``."""
        ref = self.make_ref()
        process.monitors[ref] = Monitor(None, None)  # its pid is not known yet
        self.network.spawn(process, ref, node, (module, function, arguments))
        return ref

    def monitor_node(self, process: Process, node: str, flag: bool) -> None:
        """``erlang:monitor_node/2`` by ``process``; calls add up."""
        count = process.watched_nodes.get(node, 0) + (1 if flag else -1)
        if count > 0:
            process.watched_nodes[node] = count
        else:
            process.watched_nodes.pop(node, None)
        if flag and node != self.name:
            self.network.monitor_node(process, node)

    # --- exits

    def exit(self, sender: Pid, to: Pid, reason: Term) -> None:
        """``erlang:exit/2`` from ``sender``."""
        if to.node != self.name:
            self.network.exit(sender, to, reason)
            return
        process = self._table.get(to)
        if process is not None:
            self._apply(process, exit_request(sender, to, reason, trapping=process.trap_exit))

    def _apply(self, process: Process, effect: Die | Deliver | None) -> None:
        if isinstance(effect, Deliver):
            process.mailbox.put(effect.message)
        elif effect is not None:
            self.terminate(process, effect.reason)

    def terminate(self, process: Process, reason: Term) -> None:
        """End ``process`` now: it is unreachable when this returns, and all who care know."""
        if process.exit_reason is not None:
            return
        process.exit_reason = reason
        self._table.pop(process.pid, None)
        if process.name is not None:
            self._names.pop(process.name, None)
        self._deaths.append((process, reason))
        if self._burying:
            return
        self._burying = True
        try:
            while self._deaths:
                self._bury(*self._deaths.popleft())
        finally:
            self._burying = False

    def _bury(self, process: Process, reason: Term) -> None:
        for ref, held in list(process.monitors.items()):
            other = self._table.get(held.pid) if held.pid is not None else None
            if other is not None:
                other.monitored_by.pop(ref, None)
            elif held.pid is None:
                self.network.demonitor(process, ref, held.target)
        process.monitors.clear()
        for alias in process.aliases:
            self._aliases.pop(alias, None)
        links, process.links = process.links, {}
        for pid, unlinking in links.items():
            if pid.node != self.name:
                if unlinking:
                    self.network.forget(process, pid.node)
                else:
                    self.network.link_exit(process, pid, reason)
            elif (peer := self._table.get(pid)) is not None:
                self.link_broken(peer, process.pid, reason)
        watchers, process.monitored_by = process.monitored_by, {}
        for ref, (watcher, target) in watchers.items():
            if watcher.node != self.name:
                self.network.down(process, watcher, ref, target, reason)
            elif (owner := self._table.get(watcher)) is not None:
                self.monitor_fired(owner, ref, reason)
        for node in process.watched_nodes:
            self.network.forget(process, node)
        process.mailbox.clear()
        runner.stop(process)
