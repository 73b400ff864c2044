"""One process: its mailbox, its task, and what it may do to others.

A process is owned by one coroutine. Everything it does to others (send, link, monitor, exit)
takes effect at once for local ones and is written straight to the link for remote ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar, overload

from bridge.exit_signals import NORMAL, is_atom
from bridge.mailbox import NOTHING, Handover, Mailbox
from bridge.process_errors import Exit, ReceiveTimeout
from bridge.term import Atom, Pid, Ref, Term

if TYPE_CHECKING:
    from bridge.node import Node

T = TypeVar("T")

# Pid | alias | registered name here | (name, node)
Dest: TypeAlias = Pid | Ref | str | tuple[str, str]
Body: TypeAlias = Callable[["Process"], Awaitable[None]]

# When an alias ends: only by unalias; with its monitor; also with its first message.
AliasMode: TypeAlias = Literal["explicit_unalias", "demonitor", "reply_demonitor", "reply"]

# Messages taken without waiting before others get a turn: a full mailbox must not starve ticks.
RECEIVES_PER_TURN: Final = 100


@dataclass(frozen=True, slots=True)
class Monitor:
    """A monitor that a process holds."""

    target: Term  # pid, or (name, node); None before a node says what it spawned
    pid: Pid | None  # of a local target; None where it is elsewhere


class Process:
    """A process of this node; also the handle by which its own code acts."""

    __slots__ = (
        "__weakref__",
        "_loop",
        "_turn",
        "aliases",
        "ancestors",
        "describe_state",
        "dictionary",
        "exit_reason",
        "group_leader",
        "initial_call",
        "label",
        "links",
        "mailbox",
        "monitored_by",
        "monitors",
        "name",
        "node",
        "parent",
        "pid",
        "task",
        "trap_exit",
        "watched_nodes",
    )

    def __init__(self, node: Node, pid: Pid, label: str, parent: Process | None) -> None:
        self.node = node
        self.pid = pid
        self.label = label
        self.name: Atom | None = None
        self.parent: Pid | None = parent.pid if parent else None
        self.ancestors: list[Term] = (
            [parent.name or parent.pid, *parent.ancestors] if parent else []
        )
        self.initial_call: tuple[str, str, int] = ("bridge.process", "open", 0)
        self.dictionary: dict[Term, Term] = {}
        self.group_leader: Pid | None = parent.group_leader if parent else None
        self.trap_exit = False
        self.mailbox = Mailbox()
        self.task: asyncio.Task[None] | None = None
        self.exit_reason: Term | None = None  # set once dead
        self.describe_state: Callable[[], Term] | None = None  # for crash reports
        # The other end -> 0, or the id of an unlink that the remote side has yet to confirm.
        self.links: dict[Pid, int] = {}
        self.monitors: dict[Ref, Monitor] = {}
        self.monitored_by: dict[Ref, tuple[Pid, Term]] = {}  # watcher, target as it named it
        self.aliases: set[Ref] = set()
        self.watched_nodes: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._turn = 0

    def __repr__(self) -> str:
        return f"Process({self.pid}, {self.name or self.label!r})"

    @property
    def alive(self) -> bool:
        """Whether signals still reach it."""
        return self.exit_reason is None

    # --- messages

    def send(self, to: Dest, message: Term) -> None:
        """Send ``message``; as ``!`` with a ``{Name, Node}``, it never fails.

        The message must not be changed afterwards: a local receiver gets the same object.
        """
        self.node.send(self.pid, to, message)

    def send_after(self, after_s: float, to: Dest, message: Term) -> asyncio.TimerHandle:
        """Send later, unless the returned handle is cancelled or this process ended first."""

        def fire() -> None:
            if self.exit_reason is None:
                self.node.send(self.pid, to, message)

        return self._loop.call_later(after_s, fire)

    @overload
    async def receive(
        self, match: None = None, *, timeout_s: float | None = None, skip: int = 0
    ) -> Term: ...

    @overload
    async def receive(
        self, match: Callable[[Term], T | None], *, timeout_s: float | None = None, skip: int = 0
    ) -> T: ...

    async def receive(
        self,
        match: Callable[[Term], Any] | None = None,
        *,
        timeout_s: float | None = None,
        skip: int = 0,
    ) -> Any:
        """The first message that ``match`` wants, as the value that ``match`` made of it.

        Args:
            match: gives None for "not this message"; without it the next message is taken.
            timeout_s: seconds to wait; None waits for ever, 0 only looks.
            skip: messages at the front known not to match (see ``mailbox_length``).

        Raises:
            ReceiveTimeout: nothing matched; every message is still there, in order.
            Exit: this process was ended by a signal.
        """
        if self.exit_reason is not None:
            raise Exit(self.exit_reason)
        self._turn += 1
        if self._turn >= RECEIVES_PER_TURN:
            self._turn = 0
            await asyncio.sleep(0)
        value = self.mailbox.take(match, skip)
        if value is not NOTHING:
            return value
        if timeout_s is not None and timeout_s <= 0:
            raise ReceiveTimeout(timeout_s)
        self._turn = 0
        future = Handover(loop=self._loop)
        self.mailbox.wait(match, future)
        timer = None
        if timeout_s is not None:
            timer = self._loop.call_later(timeout_s, _time_out, future, timeout_s)
        cancelled = False
        try:
            return await future
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self.mailbox.stop_waiting(give_back=cancelled)

    @property
    def mailbox_length(self) -> int:
        """Messages waiting."""
        return len(self.mailbox)

    # --- identity

    def make_ref(self) -> Ref:
        """A reference that no other equals."""
        return self.node.make_ref()

    def alias(self, mode: AliasMode = "explicit_unalias") -> Ref:
        """A reference that messages can be sent to while it is active."""
        return self.node.alias(self, mode)

    def unalias(self, alias: Ref) -> bool:
        """Make ``alias`` inactive: what is sent to it vanishes. False if it was already."""
        return self.node.unalias(self, alias)

    # --- links, monitors, exits

    def link(self, pid: Pid) -> None:
        """Link to ``pid``. If it does not exist, an exit signal ``noproc`` comes back."""
        self.node.link(self, pid)

    def unlink(self, pid: Pid) -> None:
        """Remove the link; no exit signal from ``pid`` arrives over it any more."""
        self.node.unlink(self, pid)

    def monitor(self, dest: Pid | str | tuple[str, str], *, alias: AliasMode | None = None) -> Ref:
        """Watch ``dest``: one ``{'DOWN', Ref, process, Dest, Reason}`` when it ends.

        Args:
            alias: make the reference also an alias of this process, ending as its mode says.
        """
        return self.node.monitor(self, dest, alias)

    def demonitor(self, ref: Ref, flush: bool = True) -> None:
        """Stop watching; with ``flush`` a DOWN that is here already is dropped."""
        if not self.node.demonitor(self, ref) and flush:
            self.mailbox.remove(lambda m: _is_down(m, ref))

    def monitor_node(self, node: str, flag: bool = True) -> None:
        """Ask for (or no longer for) one ``{nodedown, Node}`` when the link to it is lost."""
        self.node.monitor_node(self, node, flag)

    def exit(self, pid: Pid, reason: Term) -> None:
        """Send an exit signal, as ``erlang:exit/2``. To end oneself, raise ``Exit``."""
        self.node.exit(self.pid, pid, reason)

    def spawn(
        self, body: Body, *, link: bool = False, name: str | None = None, label: str = ""
    ) -> Pid:
        """Start a process whose parent this is. Raises NameRegistered."""
        child = self.node.spawn_process(body, parent=self, link=link, name=name, label=label)
        return child.pid

    def spawn_monitor(
        self, body: Body, *, name: str | None = None, label: str = ""
    ) -> tuple[Pid, Ref]:
        """Start a process and watch it. Raises NameRegistered."""
        pid = self.spawn(body, name=name, label=label)
        return pid, self.monitor(pid)

    # --- a process without a task of its own: `with node.open_process() as me:`

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        reason: Term = NORMAL
        if isinstance(error, Exit):
            reason = error.reason
        elif error is not None:
            reason = (Atom(type(error).__name__), str(error).encode(), [])
        self.node.terminate(self, reason)


def _time_out(future: asyncio.Future[Any], timeout_s: float) -> None:
    if not future.done():
        future.set_exception(ReceiveTimeout(timeout_s))


def _is_down(message: Term, ref: Ref) -> bool:
    return (
        type(message) is tuple
        and len(message) == 5
        and is_atom(message[0], "DOWN")
        and bool(message[1] == ref)
    )
