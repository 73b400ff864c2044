"""The registered process ``speed_meter``: has each device of this machine measured, once.

A spare port is leased for it, runs some steps of a made-up model, and is ended. That is about two
seconds of work, the first time that a version runs on a machine; it is done while nothing runs
here, or while what runs is idle. What was found goes to ``membership``, which tells the others.
What was found while other programs were busy is a guess: it is told, and measured some times more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.cost_model import Speed
from control.device_speed import SpeedFile, checked, devices_of, kernels_version, speeds_term
from control.machine import Machine

log = logging.getLogger("control.speed_meter")

LEASE_NAME: Final = "$speed_meter"  # no instance can be called so
LEASE_S: Final = 90.0
MEASURE_S: Final = 600.0  # kernels may have to be compiled first, of several processes by one
MOST_TRIES: Final = 5  # on a machine that is never idle
TELL_S: Final = 5.0
LEAST_FREE_BYTES: Final = 2**30
_PORTS: Final = Atom("ports")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When.

    Attributes:
        check_s: from the start, and between two looks whether the machine is idle.
        settle_s: from a port's lease until it measures: another spare starts in its place.
        again_s: before a device is measured anew that may have been slowed down; then twice that.
        idle_percent: of all cores' time; up to there the machine counts as idle.
    """

    check_s: float = 5.0
    settle_s: float = 5.0
    again_s: float = 60.0
    idle_percent: float = 25.0


@dataclass(slots=True)
class _Open:
    """A device that is not measured, or not well.

    Attributes:
        due_s: when it is measured next; tries: how often it was.
    """

    device: str
    due_s: float = 0.0
    tries: int = 0
    best: Speed | None = None


class SpeedMeter(GenServer):
    """Looks now and then whether it is a good time, until all is measured.

    Args:
        path: where the figures are kept.
        read: this machine.
        used_percent: of all cores' time since it was asked last.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[], Machine],
        *,
        used_percent: Callable[[], float],
        pace: Pace | None = None,
    ) -> None:
        super().__init__()
        self._file, self._read, self._used_percent = SpeedFile(path), read, used_percent
        self._pace = pace or Pace()
        self._speeds: dict[str, Speed] = {}
        self._failed: dict[str, str] = {}

    def format_state(self) -> Term:
        return {
            Atom("speeds"): speeds_term(self._speeds),
            Atom("failed"): [(device, why) for device, why in self._failed.items()],
        }

    async def init(self, me: Process) -> None:
        me.spawn(self._work, link=True, label="measures devices")

    # -- in a process of its own -----------------------------------------------------------

    async def _work(self, me: Process) -> None:
        version = await asyncio.to_thread(kernels_version)
        kept = self._file.read(version)
        devices = devices_of(self._read())
        self._speeds = {device: kept[what] for device, what in devices.items() if what in kept}
        await self._tell(me)
        todo = [_Open(device) for device in devices if device not in self._speeds]
        self._used_percent()
        while todo:
            await asyncio.sleep(self._pace.check_s)
            percent, now_s = self._used_percent(), asyncio.get_running_loop().time()
            one = min(todo, key=lambda one: one.due_s)
            what = devices[one.device]
            if what in kept:  # another one of the same name
                one.best = kept[what]
                todo.remove(one)
            elif one.due_s > now_s or not await self._is_good_time(me, percent):
                continue
            elif await self._try(me, one, percent):
                todo.remove(one)
            if one.best is None:
                continue
            self._speeds[one.device] = one.best
            if one not in todo:
                kept[what] = one.best
                self._file.write(version, kept)
            await self._tell(me)

    async def _try(self, me: Process, one: _Open, percent: float) -> bool:
        """Measure once; whether that was it."""
        speed = await self._measure(me, one.device)
        if speed is None:
            return True
        one.tries += 1
        one.best = speed if one.best is None else _faster(one.best, speed)
        one.due_s = asyncio.get_running_loop().time() + self._pace.again_s * 2**one.tries / 2
        return percent <= self._pace.idle_percent or one.tries >= MOST_TRIES

    async def _is_good_time(self, me: Process, percent: float) -> bool:
        """No rank runs here, or all that do wait for requests; and there is memory."""
        if self._read().available_bytes < LEAST_FREE_BYTES:
            return False
        try:
            ports = await gen_server.call(me, _PORTS, _PORTS)
        except gen_server.CallError:  # it is starting
            return False
        runs = any(text_of(port["instance"]) for port in ports)
        return not runs or percent <= self._pace.idle_percent

    async def _measure(self, me: Process, device: str) -> Speed | None:
        """None where it cannot be; the log and ``format_state`` say why."""
        try:
            lease = (Atom("lease"), LEASE_NAME, 0)
            match await gen_server.call(me, _PORTS, lease, timeout_s=LEASE_S):
                case ("ok", port_id, Pid() as port, _):
                    request = (Atom("measure"), device, self._read().cores)
                    try:
                        await asyncio.sleep(self._pace.settle_s)
                        answer = await gen_server.call(me, port, request, timeout_s=MEASURE_S)
                    finally:
                        await gen_server.call(me, _PORTS, (Atom("release"), port_id))
                case other:
                    answer = other
            match answer:
                case ("ok", weights_per_s, flops_per_s):
                    speed = checked(weights_per_s, flops_per_s)
                case ("error", _, text):
                    raise ValueError(text_of(text))
                case _:
                    raise ValueError(f"no answer but {answer!r}")
        except (gen_server.CallError, TypeError, ValueError) as exc:
            self._failed[device] = str(exc)
            log.warning("the speed of %s is assumed, it cannot be measured: %s", device, exc)
            return None
        log.info("%s: %.3g weights/s, %.3g flops/s", device, speed.weights_per_s, speed.flops_per_s)
        return speed

    async def _tell(self, me: Process) -> None:
        told: Term = {Atom("speeds"): speeds_term(self._speeds)}
        await gen_server.call(me, Atom("membership"), (Atom("tell"), told), timeout_s=TELL_S)


def _faster(a: Speed, b: Speed) -> Speed:
    """What a device showed that it can do."""
    return Speed(max(a.weights_per_s, b.weights_per_s), max(a.flops_per_s, b.flops_per_s))
