"""The network of a started node: which peer each signal that leaves it goes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.control_messages import ExitSignal, Send, SendAlias, SendName
from bridge.net_kernel import NetKernel
from bridge.term import Atom, Pid, Ref, Term

if TYPE_CHECKING:
    from bridge.process import Process


class Routes:
    """``Network`` over connections. What begins something connects; what ends it does not.

    Sending raises EncodeError for a message that no Erlang term can hold.
    """

    def __init__(self, kernel: NetKernel) -> None:
        self._kernel = kernel

    def send_pid(self, sender: Pid, to: Pid, message: Term) -> None:
        """``To ! Message``."""
        self._kernel.peer(to.node).send(Send(sender, to, message))

    def send_name(self, sender: Pid, node: str, name: str, message: Term) -> None:
        """``{Name, Node} ! Message``."""
        self._kernel.peer(node).send(SendName(sender, Atom(name), message))

    def send_alias(self, sender: Pid, alias: Ref, message: Term) -> None:
        """``Alias ! Message``."""
        self._kernel.peer(alias.node).send(SendAlias(sender, alias, message))

    def exit(self, sender: Pid, to: Pid, reason: Term) -> None:
        """``exit(To, Reason)``."""
        self._kernel.peer(to.node).send(ExitSignal(sender, to, reason))

    def link(self, process: Process, to: Pid) -> None:
        """``process`` has noted the link already."""
        self._kernel.peer(to.node).link(process, to)

    def monitor(self, process: Process, ref: Ref, target: Pid | tuple[str, str]) -> None:
        """``process`` has noted the monitor already."""
        self._kernel.peer(_node_of(target)).monitor(process, ref, target)

    def monitor_node(self, process: Process, node: str) -> None:
        """As OTP, this connects."""
        self._kernel.peer(node).watch_node(process)

    def spawn(
        self, process: Process, ref: Ref, node: str, mfa: tuple[str, str, list[Term]]
    ) -> None:
        """``process`` has noted the monitor already."""
        self._kernel.peer(node).spawn(process, ref, *mfa)

    def unlink(self, process: Process, to: Pid, unlink_id: int) -> None:
        """``process`` has noted the id already."""
        if (peer := self._kernel.known(to.node)) is not None:
            peer.unlink(process, to, unlink_id)
        else:
            process.links.pop(to, None)

    def link_exit(self, sender: Process, to: Pid, reason: Term) -> None:
        """``sender`` ended."""
        if (peer := self._kernel.known(to.node)) is not None:
            peer.link_exit(sender, to, reason)

    def demonitor(self, process: Process, ref: Ref, target: Pid | tuple[str, str] | None) -> None:
        """Nothing is told of a spawn without an answer yet: that finds nobody when it comes."""
        if target is not None and (peer := self._kernel.known(_node_of(target))) is not None:
            peer.demonitor(process, ref, target)

    def down(self, process: Process, watcher: Pid, ref: Ref, target: Term, reason: Term) -> None:
        """``process`` ended."""
        if (peer := self._kernel.known(watcher.node)) is not None:
            peer.down(watcher, ref, target, reason)

    def forget(self, process: Process, node: str) -> None:
        """``process`` ended."""
        if (peer := self._kernel.known(node)) is not None:
            peer.forget(process)


def _node_of(target: Pid | tuple[str, str]) -> str:
    return target.node if isinstance(target, Pid) else target[1]
