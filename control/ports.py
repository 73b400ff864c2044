"""The registered process ``ports``: owns every OS child of this node, leases it to a rank.

Keeps spare children that have imported their engine already, so that a rank is replaced
in the time it takes to map the weights. Writes down which children it has, so that the
next life of the control process adopts those that still run and kills the rest.

================================================  ==========================================
call ``{lease, Instance, Rank}``                  ``{ok, PortId, PortPid, OsPid}`` or an error
call ``{release, PortId}``                        ``ok``: killed, and waited for 5 s at most
call ``{hello, PortPid, Facts}`` (from a port)    ``welcome`` | ``unknown``
call ``ports``                                    list of maps
sends ``{port_exit, PortId, Text}``               to the leaseholder
================================================  ==========================================
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control.os_process import OsChild, OsIdentity

log = logging.getLogger("control.ports")

HELLO_S = 60.0  # from start of the OS process to its hello; importing may be slow on a cold disk
ADOPT_S = 3.0  # how long a lease waits for the child of a former life
ORPHAN_S = 10.0  # after which children of a former life are killed
KILL_S = 5.0
MAX_ATTEMPTS = 3  # ports that a lease may wait for, one after the other
TRIM_S = 30.0


class StartPort(Protocol):
    """Starts the OS process of a port; passed in, so that tests can start another program."""

    def __call__(self, port_id: str) -> OsChild:
        """Raises OSError."""
        ...


@dataclass(slots=True)
class _Child:
    port_id: str
    identity: OsIdentity
    os_child: OsChild | None  # None: adopted from a former life
    pid: Pid | None = None  # None until it said hello
    instance: str = ""
    rank: int = -1
    holder: Pid | None = None
    monitor: Ref | None = None
    waiter: Term = None  # From of a lease that waits for the hello
    attempt: int = 1  # which port this is that the lease waits for


@dataclass(slots=True)
class PortsState:
    """What ``sys:get_state`` shows."""

    children: dict[str, _Child] = field(default_factory=dict)
    started: int = 0


class Ports(GenServer):
    """Broker of OS children.

    Args:
        start_port: starts one child.
        record_path: JSON file that survives this process.
        num_spares: idle children kept ready for each rank of the largest instance: when one
            rank is lost, all of them start anew.
        name_prefix: makes port ids unique on the machine across lives.
        trim_s: from the end of a rank until spares that nobody needs any more are ended.
    """

    def __init__(
        self,
        start_port: StartPort,
        *,
        record_path: Path,
        num_spares: int,
        name_prefix: str,
        trim_s: float = TRIM_S,
    ) -> None:
        super().__init__()
        self._start_port = start_port
        self._record_path = record_path
        self._num_spares = num_spares
        self._prefix = name_prefix
        self._trim_s = trim_s
        self.state = PortsState()

    def format_state(self) -> Term:
        return [self._describe(c) for c in self.state.children.values()]

    async def init(self, me: Process) -> None:
        self.me.trap_exit = True  # so that terminate runs and no child is left over
        self._adopt_records()
        self._fill_spares()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("lease", instance, int(rank)):
                return self._lease(text_of(instance), rank, from_)
            case ("release", port_id):
                self._release(text_of(port_id), from_)
                return NOREPLY
            case ("hello", Pid() as pid, dict(facts)):
                return self._hello(pid, facts)
            case "ports":
                return self.format_state()
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("os_exit", str(port_id), str(text)):
                self._on_exit(port_id, text)
            case ("expire", str(port_id)):
                self._expire(port_id)
            case ("fill_spares",):
                self._fill_spares()
            case ("trim_spares",):
                self._trim_spares()
            case ("DOWN", Ref() as monitor, _, _, _):
                for child in list(self.state.children.values()):
                    if child.monitor == monitor:
                        self._kill(child)
            case ("EXIT", _, _):
                pass  # a watcher ended
            case _:
                await super().handle_info(message)

    async def terminate(self, reason: Term) -> None:
        children = list(self.state.children.values())
        for child in children:
            child.identity.kill_group()
        await asyncio.gather(*(self._gone(child) for child in children))
        self.state.children.clear()
        self._write_records()

    # -- leases ----------------------------------------------------------------------------

    def _lease(self, instance: str, rank: int, from_: Term, attempt: int = 1) -> Term:
        child = self._choose(instance, rank)
        if child is None:
            try:
                child = self._start()
            except OSError as exc:
                return (Atom("error"), Atom("port_start"), f"cannot start a compute port: {exc}")
        holder = from_[0]
        child.instance, child.rank, child.holder = instance, rank, holder
        child.monitor = self.me.monitor(holder)
        self._write_records()
        self._later(1.0, (Atom("fill_spares"),))
        if child.pid is not None:
            return self._leased(child)
        child.waiter, child.attempt = from_, attempt
        self._later(ADOPT_S if child.os_child is None else HELLO_S, (Atom("expire"), child.port_id))
        return NOREPLY

    def _choose(self, instance: str, rank: int) -> _Child | None:
        """The child that already holds this rank's weights, else a spare, readiest first."""
        free = [c for c in self.state.children.values() if c.holder is None]
        for child in free:
            if (child.instance, child.rank) == (instance, rank):
                return child
        spares = [c for c in free if not c.instance]
        return min(spares, key=lambda c: c.pid is None, default=None)

    def _leased(self, child: _Child) -> Term:
        assert child.pid is not None
        return (Atom("ok"), child.port_id, child.pid, child.identity.pid)

    def _release(self, port_id: str, from_: Term) -> None:
        child = self.state.children.get(port_id)
        if child is None:
            gen_server.reply(self.me, from_, Atom("ok"))
            return
        self._kill(child)

        async def wait(me: Process) -> None:
            await self._gone(child)
            gen_server.reply(me, from_, Atom("ok"))

        self.me.spawn(wait, link=True, label=f"release {port_id}")

    def _hello(self, pid: Pid, facts: dict[Any, Term]) -> Term:
        child = self.state.children.get(text_of(facts.get("port_id", b"")))
        if child is None:
            log.warning("hello from a port that is not ours: %s", pid)
            return Atom("unknown")
        child.pid = pid
        if child.waiter is not None:
            gen_server.reply(self.me, child.waiter, self._leased(child))
            child.waiter = None
        return Atom("welcome")

    # -- OS children -----------------------------------------------------------------------

    def _start(self) -> _Child:
        self.state.started += 1
        port_id = f"{self._prefix}_{self.state.started}"
        os_child = self._start_port(port_id)
        child = _Child(port_id, os_child.identity, os_child)
        self.state.children[port_id] = child
        self._watch(child)
        self._write_records()
        return child

    def _watch(self, child: _Child) -> None:
        async def watch(me: Process) -> None:
            if child.os_child is not None:
                text = _status_text(await child.os_child.wait())
            else:
                await child.identity.wait_gone(timeout_s=None)
                text = "exited"
            me.send(self.me.pid, (Atom("os_exit"), child.port_id, text))

        self.me.spawn(watch, link=True, label=f"watch {child.port_id}")

    def _fill_spares(self) -> None:
        for _ in range(self._wanted_spares() - len(self._spares())):
            try:
                self._start()
            except OSError as exc:
                log.error("cannot start a spare port: %s", exc)
                return

    def _trim_spares(self) -> None:
        """End spares beyond what the instances of now need, the last started first."""
        for child in self._spares()[self._wanted_spares() :]:
            self._kill(child)

    def _spares(self) -> list[_Child]:
        return [c for c in self.state.children.values() if not c.instance and c.holder is None]

    def _wanted_spares(self) -> int:
        ranks = Counter(c.instance for c in self.state.children.values() if c.instance)
        return self._num_spares * max(ranks.values(), default=1)

    def _on_exit(self, port_id: str, text: str) -> None:
        child = self.state.children.pop(port_id, None)
        if child is None:
            return
        if child.os_child is not None:
            child.os_child.reap()
        if child.monitor is not None:
            self.me.demonitor(child.monitor)
        if child.waiter is not None:
            self._lease_again(child, text)
        elif child.holder is not None:
            self.me.send(child.holder, (Atom("port_exit"), port_id, text))
        self._write_records()
        if child.instance:
            self._later(self._trim_s, (Atom("trim_spares"),))
        else:
            self._later(1.0, (Atom("fill_spares"),))  # a spare that keeps dying must not spin

    def _lease_again(self, child: _Child, text: str) -> None:
        """A port ended before it was handed over: that is no fault of the rank, take another."""
        answer: Term = (
            Atom("error"),
            Atom("port_exit"),
            f"{child.attempt} compute ports ended before they answered, the last, {child.port_id}, "
            f"{text}; see logs/port-{child.port_id}.log",
        )
        if child.attempt < MAX_ATTEMPTS:
            log.warning("port %s %s before it answered; taking another", child.port_id, text)
            answer = self._lease(child.instance, child.rank, child.waiter, child.attempt + 1)
        if answer is not NOREPLY:
            gen_server.reply(self.me, child.waiter, answer)

    def _expire(self, port_id: str) -> None:
        child = self.state.children.get(port_id)
        if child is None or (child.pid is not None and child.holder is not None):
            return
        log.warning("port %s did not come back in time or nobody wants it; killed", port_id)
        self._kill(child)

    async def _gone(self, child: _Child) -> None:
        """Wait for the end of a child that was killed."""
        gone = await child.identity.wait_gone(timeout_s=KILL_S)
        if child.os_child is not None:
            gone = await child.os_child.reaped(timeout_s=KILL_S)
        if not gone:
            log.error("port %s was killed but is still there", child.port_id)

    def _kill(self, child: _Child) -> None:
        child.identity.kill_group()

    # -- former lives ----------------------------------------------------------------------

    def _adopt_records(self) -> None:
        for record in _read_records(self._record_path):
            identity = OsIdentity(record["os_pid"], record["started_s"])
            if not identity.alive():
                continue
            child = _Child(record["port_id"], identity, None)
            child.instance, child.rank = record["instance"], record["rank"]
            if not child.instance:  # a spare of a former life: cheaper to start a new one
                identity.kill_group()
                continue
            self.state.children[child.port_id] = child
            self._watch(child)
            self._later(ORPHAN_S, (Atom("expire"), child.port_id))

    def _write_records(self) -> None:
        rows = [
            {
                "port_id": c.port_id,
                "os_pid": c.identity.pid,
                "started_s": c.identity.started_s,
                "instance": c.instance,
                "rank": c.rank,
            }
            for c in self.state.children.values()
        ]
        temporary = self._record_path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(rows))
            temporary.replace(self._record_path)
        except OSError as exc:  # a full disk costs adoption after a crash, not service
            log.error("cannot write %s: %s", self._record_path, exc)

    def _later(self, delay_s: float, message: Term) -> None:
        self.me.send_after(delay_s, self.me.pid, message)

    def _describe(self, child: _Child) -> Term:
        return {
            Atom("port_id"): child.port_id,
            Atom("os_pid"): child.identity.pid,
            Atom("instance"): child.instance,
            Atom("rank"): child.rank,
            Atom("connected"): child.pid is not None,
            Atom("adopted"): child.os_child is None,
        }


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())
        return [
            {
                "port_id": str(r["port_id"]),
                "os_pid": _pid(r["os_pid"]),
                "started_s": float(r["started_s"]),
                "instance": str(r["instance"]),
                "rank": int(r["rank"]),
            }
            for r in rows
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError) as exc:
        log.error("cannot read %s: %s; ports of a former life end by themselves", path, exc)
        return []


def _pid(value: object) -> int:
    if not isinstance(value, int) or not 0 < value < 1 << 31:
        raise ValueError(f"{value!r} is no pid")
    return value


def _status_text(status: int) -> str:
    if status >= 0 or sys.platform == "win32":
        return f"exited with status {status}"
    return f"was killed by signal {-status}"
