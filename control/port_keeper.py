"""OS children of a node: started, kept ready, watched, adopted from a former life, killed.

`ports` is one of these that also knows who holds which child.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.process import Process
from bridge.term import Atom, Term
from control.os_process import OsChild
from control.port_child import Child, read_records, write_records

log = logging.getLogger("control.ports")

ORPHAN_S = 10.0
KILL_S = 5.0
TRIM_S = 30.0
WARM_S = 5.0


class StartPort(Protocol):
    """Starts the OS process of a port; passed in, so that tests can start another program."""

    def __call__(self, port_id: str) -> OsChild:
        """Raises OSError."""
        ...


@dataclass(slots=True)
class PortsState:
    """What ``sys:get_state`` shows."""

    children: dict[str, Child] = field(default_factory=dict)
    started: int = 0
    spans: bool = False  # ranks here have met those of other machines


class PortKeeper(GenServer):
    """Keeper of OS children.

    Args:
        start_port: starts one child.
        record_path: JSON file that survives this process.
        num_spares: idle children kept ready for each rank of the largest instance: when one
            rank is lost, all of them start anew.
        name_prefix: makes port ids unique on the machine across lives.
        trim_s: from the end of a rank until spares that nobody needs any more are ended.
        orphan_s: for which a child is kept whose holder is out of reach.
    """

    def __init__(
        self,
        start_port: StartPort,
        *,
        record_path: Path,
        num_spares: int,
        name_prefix: str,
        trim_s: float = TRIM_S,
        orphan_s: float = ORPHAN_S,
    ) -> None:
        super().__init__()
        self._start_port = start_port
        self._record_path = record_path
        self._num_spares = num_spares
        self._prefix = name_prefix
        self._trim_s, self._orphan_s = trim_s, orphan_s
        self.state = PortsState()

    def format_state(self) -> Term:
        return [_describe(c) for c in self.state.children.values()]

    async def init(self, me: Process) -> None:
        self.me.trap_exit = True  # so that terminate runs and no child is left over
        self._adopt_records()
        self._fill_spares()
        self._later(WARM_S, (Atom("warm_spares"),))

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("os_exit", str(port_id), str(text)):
                child = self.state.children.pop(port_id, None)
                if child is not None:
                    self._exited(child, text)
            case ("expire", str(port_id), int(version)):
                self._expire(port_id, version)
            case ("fill_spares",):
                self._fill_spares()
            case ("warm_spares",):
                self._warm_spares()
                self._later(WARM_S, (Atom("warm_spares"),))
            case ("trim_spares",):
                self._trim_spares()
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

    # -- children --------------------------------------------------------------------------

    def _start(self) -> Child:
        self.state.started += 1
        port_id = f"{self._prefix}_{self.state.started}"
        os_child = self._start_port(port_id)
        child = Child(port_id, os_child.identity, os_child)
        self.state.children[port_id] = child
        self._watch(child)
        self._write_records()
        return child

    def _watch(self, child: Child) -> None:
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

    def _warm_spares(self) -> None:
        """Where there are other machines, have spares import what ranks need to meet them.

        It takes seconds and memory, so a machine that is alone does without.
        """
        if not (self.state.spans or self._has_peers()):
            return
        for child in self._spares():
            if child.pid is not None and not child.warm:
                child.warm = True
                gen_server.cast(self.me, child.pid, Atom("warm_network"))

    def _has_peers(self) -> bool:
        mine = _host(self.me.node.name)
        return any(_host(name) != mine for name in self.me.node.nodes())

    def _trim_spares(self) -> None:
        """End spares beyond what the instances of now need, the last started first."""
        for child in self._spares()[self._wanted_spares() :]:
            self._kill(child)

    def _spares(self) -> list[Child]:
        return [c for c in self.state.children.values() if not c.seat.instance and c.free]

    def _wanted_spares(self) -> int:
        ranks = Counter(c.seat.instance for c in self.state.children.values() if c.seat.instance)
        return self._num_spares * max(ranks.values(), default=1)

    def _exited(self, child: Child, text: str) -> None:
        """It has ended, and is no child any more."""
        if child.os_child is not None:
            child.os_child.reap()
        self._write_records()
        if child.seat.instance:
            self._later(self._trim_s, (Atom("trim_spares"),))
        else:
            self._later(1.0, (Atom("fill_spares"),))  # a spare that keeps dying must not spin

    def _expire_later(self, child: Child, after_s: float) -> None:
        self._later(after_s, (Atom("expire"), child.port_id, child.version))

    def _expire(self, port_id: str, version: int) -> None:
        child = self.state.children.get(port_id)
        if child is None or child.version != version:
            return
        if child.pid is not None and child.holder is not None:
            return
        log.warning("port %s did not come back in time or nobody wants it; killed", port_id)
        self._kill(child)

    async def _gone(self, child: Child) -> None:
        """Wait for the end of a child that was killed."""
        gone = await child.identity.wait_gone(timeout_s=KILL_S)
        if child.os_child is not None:
            gone = await child.os_child.reaped(timeout_s=KILL_S)
        if not gone:
            log.error("port %s was killed but is still there", child.port_id)

    def _kill(self, child: Child) -> None:
        child.killed = True
        child.identity.kill_group()

    # -- former lives ----------------------------------------------------------------------

    def _adopt_records(self) -> None:
        for child in read_records(self._record_path):
            if not child.identity.alive():
                continue
            if not child.seat.instance:  # a spare of a former life: cheaper to start a new one
                child.identity.kill_group()
                continue
            self.state.children[child.port_id] = child
            self._watch(child)
            self._expire_later(child, self._orphan_s)

    def _write_records(self) -> None:
        write_records(self._record_path, self.state.children.values())

    def _later(self, delay_s: float, message: Term) -> None:
        self.me.send_after(delay_s, self.me.pid, message)


def _describe(child: Child) -> Term:
    return {
        Atom("port_id"): child.port_id,
        Atom("os_pid"): child.identity.pid,
        Atom("instance"): child.seat.instance,
        Atom("rank"): child.seat.rank,
        Atom("holder"): child.holder or Atom("undefined"),
        Atom("connected"): child.pid is not None,
        Atom("adopted"): child.os_child is None,
    }


def _host(node: str) -> str:
    return node.partition("@")[2]


def _status_text(status: int) -> str:
    if status >= 0 or sys.platform == "win32":
        return f"exited with status {status}"
    return f"was killed by signal {-status}"
