"""Errors of processes and gen_server calls, each with the exit reason that OTP would give it."""

from __future__ import annotations

from bridge.errors import BridgeError
from bridge.show import show
from bridge.term import Atom, Term


class ProcessError(BridgeError):
    """Any error of this layer."""


class Exit(ProcessError):
    """Raise inside a process to end it with ``reason``, as ``erlang:exit/1`` does.

    Args:
        quiet: the reason is an answer, not a fault: no crash report is written.
    """

    def __init__(self, reason: Term, *, quiet: bool = False) -> None:
        super().__init__(reason)
        self.reason: Term = reason
        self.quiet = quiet

    def __str__(self) -> str:
        return f"exit: {show(self.reason, 500)}"


class ReceiveTimeout(ProcessError):
    """No message matched in time; the mailbox is as it was."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"no matching message within {self.timeout_s:g} s"


class NameRegistered(ProcessError):
    """A name that is to be registered belongs to a living process already."""

    def __init__(self, name: str, owner: Term) -> None:
        super().__init__(name, owner)
        self.name, self.owner = name, owner

    def __str__(self) -> str:
        return f"the name {self.name!r} is registered to {self.owner!r}: unregister it first"


class StartError(ProcessError):
    """A server did not start: ``init`` failed, ran out of time, or its name is taken."""

    def __init__(self, reason: Term) -> None:
        super().__init__(reason)
        self.reason: Term = reason

    def __str__(self) -> str:
        return f"server did not start: {show(self.reason, 500)}"


class CallError(Exit):
    """A ``gen_server`` call got no reply. Uncaught, it ends the caller with OTP's own reason.

    Attributes:
        why: OTP's first element of the exit reason: ``timeout``, ``noproc``, ...
        dest: what was called.
    """

    def __init__(self, why: Term, dest: Term, request: Term, timeout_s: float | None) -> None:
        limit = Atom("infinity") if timeout_s is None else round(timeout_s * 1000)
        where = (Atom("gen_server"), Atom("call"), [dest, request, limit])
        super().__init__((why, where))
        self.why: Term = why
        self.dest: Term = dest

    def __str__(self) -> str:
        return f"call of {show(self.dest)} failed: {show(self.why)}"


class CallTimeout(CallError):
    """The server did not answer in time; a late reply will vanish."""


class NoProc(CallError):
    """No such process."""


class NodeDown(CallError):
    """The server's node cannot be reached, or the link to it broke."""


class CallExit(CallError):
    """The server ended before it answered; ``why`` is its exit reason."""
