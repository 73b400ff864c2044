"""What travels on a distribution link, as types.

Names follow OTP's signals. ``sender`` and ``to`` are always who sends the signal and who gets
it, also where the tuple of the protocol has other names. Their tuples are `control_codec`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from bridge.term import Atom, Pid, Ref, Term


@dataclass(frozen=True, slots=True)
class Tick:
    """An empty packet: the peer lives."""


@dataclass(frozen=True, slots=True)
class Send:
    """``To ! Message`` by pid; ``sender`` is None if the peer does not say who sent."""

    sender: Pid | None
    to: Pid
    message: Term
    priority: bool = False


@dataclass(frozen=True, slots=True)
class SendName:
    """``{Name, Node} ! Message``."""

    sender: Pid
    to: Atom
    message: Term
    priority: bool = False


@dataclass(frozen=True, slots=True)
class SendAlias:
    """``Alias ! Message``."""

    sender: Pid
    to: Ref
    message: Term
    priority: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    sender: Pid
    to: Pid


@dataclass(frozen=True, slots=True)
class Unlink:
    """Answered with an UnlinkAck of the same ``id`` (1 to 2**64 - 1)."""

    id: int
    sender: Pid
    to: Pid


@dataclass(frozen=True, slots=True)
class UnlinkAck:
    id: int
    sender: Pid
    to: Pid


@dataclass(frozen=True, slots=True)
class LinkExit:
    """A linked process ended: the link breaks."""

    sender: Pid
    to: Pid
    reason: Term


@dataclass(frozen=True, slots=True)
class ExitSignal:
    """``exit(To, Reason)``: ``to`` is an alias where a stock OTP 28 signals with priority."""

    sender: Pid
    to: Pid | Ref | Atom
    reason: Term
    priority: bool = False


@dataclass(frozen=True, slots=True)
class Monitor:
    sender: Pid
    to: Pid | Atom
    ref: Ref


@dataclass(frozen=True, slots=True)
class Demonitor:
    sender: Pid
    to: Pid | Atom
    ref: Ref


@dataclass(frozen=True, slots=True)
class MonitorDown:
    """The monitored ``sender`` ended; it is the name where the monitor was set by name."""

    sender: Pid | Atom
    to: Pid
    ref: Ref
    reason: Term


@dataclass(frozen=True, slots=True)
class SpawnRequest:
    """``id`` is the reference of the monitor, too, if ``options`` ask for one."""

    id: Ref
    sender: Pid
    group_leader: Pid
    module: Atom
    function: Atom
    arguments: list[Term]
    options: Term


@dataclass(frozen=True, slots=True)
class SpawnReply:
    """``result`` is the new pid, or an atom that says why there is none."""

    id: Ref
    to: Pid
    linked: bool
    monitored: bool
    result: Pid | Atom


@dataclass(frozen=True, slots=True)
class GroupLeader:
    """Make ``sender`` the group leader of ``to``."""

    sender: Pid
    to: Pid


Message: TypeAlias = (
    Send
    | SendName
    | SendAlias
    | Link
    | Unlink
    | UnlinkAck
    | LinkExit
    | ExitSignal
    | Monitor
    | Demonitor
    | MonitorDown
    | SpawnRequest
    | SpawnReply
    | GroupLeader
)
