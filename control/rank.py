"""One rank of an instance: holds a port on lease and dies when the port is lost.

The port may be of another machine (`control/rank_lease.py`). The rank starts at once and gets
its port later, so that all ranks wait for theirs together and can be ended meanwhile.

==================  =================================================================
call ``port``       ``{ok, Port}`` once there is one; the rank ends where none comes
call ``describe``   a map
==================  =================================================================

Four signs of a lost port: its OS process ended, its socket closed, its node's monitor
fired, its beats stopped. The first three are certain. Silence is not: a silent port is
killed only on a second sign (the OS says it is stopped, or a ping goes unanswered),
and never while our own event loop was late. A port of another machine is silent, too, when that
machine is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer, Stop
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control.os_process import OsIdentity
from control.rank_lease import Want, hold, ports_of

CHECK_S = 0.25
RELEASE_S = 7.0
FAR_RELEASE_S = 1.0  # of another machine, which may be gone: it knows what to do without us


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLimits:
    """When silence counts.

    Attributes:
        silence_s: without a beat, the port is suspected.
        ping_s: a suspected port that does not answer this long is killed.
        step_s: a port whose engine makes no step this long while busy is killed.
        lease_s: longest wait for a port.
    """

    silence_s: float = 1.5
    ping_s: float = 1.0
    step_s: float = 300.0
    lease_s: float = 70.0


def is_silent(now_s: float, beat_s: float, checked_s: float, limits: RankLimits) -> bool:
    """Whether a port whose last beat came at ``beat_s`` is suspected at ``now_s``.

    ``checked_s`` is when we last looked: where that is long ago, we were late ourselves and
    its beats may still wait in our mailbox.
    """
    return now_s - beat_s > limits.silence_s and now_s - checked_s < 2 * CHECK_S


class Rank(GenServer):
    """Leaseholder of one port.

    Args:
        want: which instance and rank, and of which machine the port.
        on_lost: told why the port was lost.
    """

    def __init__(
        self,
        want: Want,
        limits: RankLimits | None = None,
        *,
        on_lost: Callable[[str], None] = lambda why: None,
    ) -> None:
        super().__init__()
        self._on_lost = on_lost
        self._want = want
        self.instance, self.rank = want.instance, want.rank
        self._limits = limits or RankLimits()
        self._waiting: list[Term] = []  # From of calls for the port
        self._lease_process: Pid | None = None
        self.port: Pid | None = None
        self.port_id = ""
        self.os_pid = 0
        self._identity: OsIdentity | None = None
        self._monitor: Ref | None = None
        self._beat_s = self._checked_s = self._step_s = 0.0
        self._steps = -1
        self._suspected = False
        self.memory_bytes = 0
        self.load_progress = (0, 0)

    def format_state(self) -> Term:
        return self.describe()

    def describe(self) -> dict[Any, Term]:
        """What the coordinator and ``ctl status`` show."""
        return {
            Atom("rank"): self.rank,
            Atom("os_pid"): self.os_pid,
            Atom("port"): self.port or Atom("undefined"),
            Atom("port_id"): self.port_id,
            Atom("memory_bytes"): self.memory_bytes,
            Atom("load_done"): self.load_progress[0],
            Atom("load_total"): self.load_progress[1],
        }

    @property
    def _is_far(self) -> bool:
        """Whether the port is another machine's."""
        return self._want.node not in ("", self.me.node.name)

    async def init(self, me: Process) -> None:
        self.me.trap_exit = True  # terminate must release the port
        body = partial(hold, want=self._want, holder=me.pid, timeout_s=self._limits.lease_s)
        label = f"lease {self.instance} {self.rank}"
        self._lease_process = self.me.spawn(body, link=True, label=label)

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "describe":
                return self.describe()
            case "port":
                if self.port is not None:
                    return (Atom("ok"), self.port)
                self._waiting.append(from_)
                return NOREPLY
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("beat", _, int(steps), busy, int(memory_bytes)):
                self._on_beat(steps, bool(busy), memory_bytes)
            case ("load_progress", _, int(done), int(total)):
                self.load_progress = (done, total)
            case ("check",):
                self._check()
            case ("leased", str(port_id), Pid() as port, int(os_pid)):
                self._leased(port_id, port, os_pid)
            case ("no_port", text) if self.port is None:
                self._on_lost(f"rank {self.rank}: {text_of(text)}")
                raise Stop((Atom("no_port"), text_of(text)))
            case ("no_port", text):
                raise self._lost(text_of(text))
            case ("port_exit", port_id, text) if text_of(port_id) == self.port_id:
                raise self._lost(text_of(text))
            case ("DOWN", ref, _, _, reason) if ref == self._monitor:
                raise self._lost(f"link lost: {reason}")
            case ("ping_failed", text):
                raise self._lost(text_of(text))
            case ("ping_ok",):
                self._suspected = False
            case ("EXIT", pid, reason) if pid == self._lease_process and reason != "normal":
                raise Stop((Atom("no_port"), show(reason)))
            case ("EXIT", _, _):
                pass  # a ping or the lease's process: it has said what it found
            case _:
                await super().handle_info(message)

    async def terminate(self, reason: Term) -> None:
        if self.port is None:
            return  # `ports` watches us: what it was about to lease ends with us
        if self._identity is not None:
            self._identity.kill_group()  # at once: nothing in a port is worth waiting for
        try:
            await gen_server.call(
                self.me,
                ports_of(self.me, self._want.node),
                (Atom("release"), self.port_id),
                timeout_s=self._release_s(),
            )
        except gen_server.CallError:
            if self._is_far:
                self._part()
            # Else `ports` is ending too and kills its children itself.

    def _release_s(self) -> float:
        if not self._is_far:
            return RELEASE_S
        gone = self._suspected or self._want.node not in self.me.node.nodes(hidden=True)
        return FAR_RELEASE_S / 4 if gone else FAR_RELEASE_S

    def _part(self) -> None:
        """Nobody there kills the port: end it ourselves, or let it know that it was left."""
        assert self.port is not None
        if self._suspected:
            self.me.node.disconnect(self.port.node)
        else:
            gen_server.cast(self.me, self.port, Atom("stop"))

    def _leased(self, port_id: str, port: Pid, os_pid: int) -> None:
        self.port_id, self.port, self.os_pid = port_id, port, os_pid
        if not self._is_far:
            self._identity = OsIdentity.of(os_pid)
        self._monitor = self.me.monitor(port)
        gen_server.cast(self.me, port, (Atom("own"), self.me.pid))
        self._beat_s = self._checked_s = self._step_s = self._now_s()
        self._check_later()
        for from_ in self._waiting:
            gen_server.reply(self.me, from_, (Atom("ok"), port))
        self._waiting.clear()

    # -- signs of life ---------------------------------------------------------------------

    def _on_beat(self, steps: int, busy: bool, memory_bytes: int) -> None:
        now_s = self._now_s()
        self._beat_s, self.memory_bytes = now_s, memory_bytes
        if steps != self._steps or not busy:
            self._steps, self._step_s = steps, now_s

    def _check(self) -> None:
        now_s = self._now_s()
        silent = is_silent(now_s, self._beat_s, self._checked_s, self._limits)
        self._checked_s = now_s
        self._check_later()
        if now_s - self._step_s > self._limits.step_s:
            raise self._lost(f"made no step for {now_s - self._step_s:.0f} s while busy")
        if silent and self._identity is not None and self._identity.stopped():
            raise self._lost(f"silent for {now_s - self._beat_s:.1f} s and stopped by a signal")
        if silent and not self._suspected:
            self._suspected = True
            self.me.spawn(self._ping, link=True, label=f"ping {self.port_id}")

    async def _ping(self, me: Process) -> None:
        assert self.port is not None
        try:
            await gen_server.call(me, self.port, Atom("facts"), timeout_s=self._limits.ping_s)
            me.send(self.me.pid, (Atom("ping_ok"),))
        except gen_server.CallError as exc:
            me.send(self.me.pid, (Atom("ping_failed"), f"silent, and no answer to a ping: {exc}"))

    def _lost(self, text: str) -> Stop:
        self._on_lost(f"rank {self.rank}, port {self.port_id}: {text}")
        return Stop((Atom("rank_lost"), self.rank, text))

    def _check_later(self) -> None:
        self.me.send_after(CHECK_S, self.me.pid, (Atom("check"),))

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()
