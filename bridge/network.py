"""What a node needs from its links to other nodes, and the node that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from bridge.exit_signals import NOCONNECTION, nodedown_message
from bridge.term import Pid, Ref, Term

if TYPE_CHECKING:
    from bridge.node import Node
    from bridge.process import Process


class Network(Protocol):
    """Carries signals to processes of other nodes. No method waits or fails.

    A link or monitor is remembered from the call on, so that ``noconnection`` reaches its owner
    whether the connection breaks later or cannot be made at all.
    """

    def send_pid(self, sender: Pid, to: Pid, message: Term) -> None: ...
    def send_name(self, sender: Pid, node: str, name: str, message: Term) -> None: ...
    def send_alias(self, sender: Pid, alias: Ref, message: Term) -> None: ...
    def link(self, process: Process, to: Pid) -> None: ...
    def unlink(self, process: Process, to: Pid, unlink_id: int) -> None: ...
    def link_exit(self, sender: Process, to: Pid, reason: Term) -> None: ...
    def exit(self, sender: Pid, to: Pid, reason: Term) -> None: ...
    def monitor(self, process: Process, ref: Ref, target: Pid | tuple[str, str]) -> None: ...
    def demonitor(
        self, process: Process, ref: Ref, target: Pid | tuple[str, str] | None
    ) -> None: ...
    def down(
        self, process: Process, watcher: Pid, ref: Ref, target: Term, reason: Term
    ) -> None: ...
    def monitor_node(self, process: Process, node: str) -> None: ...
    def forget(self, process: Process, node: str) -> None: ...
    def spawn(
        self, process: Process, ref: Ref, node: str, mfa: tuple[str, str, list[Term]]
    ) -> None: ...


class NoNetwork:
    """A node on its own: every other node is unreachable."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def send_pid(self, sender: Pid, to: Pid, message: Term) -> None:
        """Nothing to send over: the message is lost."""

    def send_name(self, sender: Pid, node: str, name: str, message: Term) -> None:
        """Nothing to send over: the message is lost."""

    def send_alias(self, sender: Pid, alias: Ref, message: Term) -> None:
        """Nothing to send over: the message is lost."""

    def link(self, process: Process, to: Pid) -> None:
        """The link breaks at once."""
        self._node.link_broken(process, to, NOCONNECTION)

    def unlink(self, process: Process, to: Pid, unlink_id: int) -> None:
        """Nobody to tell."""
        process.links.pop(to, None)

    def link_exit(self, sender: Process, to: Pid, reason: Term) -> None:
        """Nobody to tell."""

    def exit(self, sender: Pid, to: Pid, reason: Term) -> None:
        """Nobody to tell."""

    def monitor(self, process: Process, ref: Ref, target: Pid | tuple[str, str]) -> None:
        """The monitor fires at once."""
        self._node.monitor_fired(process, ref, NOCONNECTION)

    def demonitor(self, process: Process, ref: Ref, target: Pid | tuple[str, str] | None) -> None:
        """Nobody to tell."""

    def down(self, process: Process, watcher: Pid, ref: Ref, target: Term, reason: Term) -> None:
        """Nobody to tell."""

    def monitor_node(self, process: Process, node: str) -> None:
        """The node is down already."""
        process.watched_nodes.pop(node, None)
        process.mailbox.put(nodedown_message(node))

    def forget(self, process: Process, node: str) -> None:
        """Nothing is remembered."""

    def spawn(
        self, process: Process, ref: Ref, node: str, mfa: tuple[str, str, list[Term]]
    ) -> None:
        """The monitor fires at once."""
        self._node.monitor_fired(process, ref, NOCONNECTION)
