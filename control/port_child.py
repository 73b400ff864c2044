"""What `ports` knows of one OS child, and the file by which its next life knows the children."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.term import Pid, Ref, Term
from control.os_process import OsChild, OsIdentity

log = logging.getLogger("control.ports")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What a child is leased for.

    Attributes:
        instance: empty for a spare.
        layout: tells weights that are cut in another way; see `instance_spec.layout_of`.
        placement: epochs of earlier placements of the instance: of two, the higher is newer.
    """

    instance: str = ""
    rank: int = -1
    layout: str = ""
    placement: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """Of these there is one at a time."""
        return self.instance, self.rank


@dataclass(slots=True)
class Child:
    """One OS child.

    Attributes:
        os_child: None where it was adopted from a former life.
        pid: None until it said hello.
        holder: the rank's process, here or on another machine; None: a spare, or an orphan.
        waiter: From of a lease that waits for the hello; attempt: which port it waits for.
        version: counts changes of holder, so that a time-out meant for an older one does nothing.
        warm: a spare that was told to import what meeting other machines takes.
        killed: it is ending.
    """

    port_id: str
    identity: OsIdentity
    os_child: OsChild | None
    seat: Seat = field(default_factory=Seat)
    pid: Pid | None = None
    holder: Pid | None = None
    monitor: Ref | None = None
    waiter: Term = None
    attempt: int = 1
    version: int = 0
    warm: bool = False
    killed: bool = False

    @property
    def free(self) -> bool:
        """Whether nobody holds it."""
        return self.holder is None and not self.killed


def write_records(path: Path, children: Iterable[Child]) -> None:
    """Replace the file; a full disk is logged: it costs adoption after a crash, not service."""
    rows = [
        {
            "port_id": c.port_id,
            "os_pid": c.identity.pid,
            "started_s": c.identity.started_s,
            "instance": c.seat.instance,
            "rank": c.seat.rank,
            "layout": c.seat.layout,
            "placement": c.seat.placement,
        }
        for c in children
    ]
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(json.dumps(rows))
        temporary.replace(path)
    except OSError as exc:
        log.error("cannot write %s: %s", path, exc)


def read_records(path: Path) -> list[Child]:
    """Children of the former life, alive or not; none where the file cannot be read."""
    try:
        return [_child(row) for row in json.loads(path.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError) as exc:
        log.error("cannot read %s: %s; ports of a former life end by themselves", path, exc)
        return []


def _child(row: dict[str, Any]) -> Child:
    seat = Seat(
        instance=str(row["instance"]),
        rank=int(row["rank"]),
        layout=str(row.get("layout", "")),
        placement=int(row.get("placement", 0)),
    )
    identity = OsIdentity(_pid(row["os_pid"]), float(row["started_s"]))
    return Child(str(row["port_id"]), identity, None, seat)


def _pid(value: object) -> int:
    if not isinstance(value, int) or not 0 < value < 1 << 31:
        raise ValueError(f"{value!r} is no pid")
    return value
