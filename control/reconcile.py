"""A new leader, or one that was restarted: what runs, compared with what should. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.term import Pid
from control.books import Record
from control.desired import Desired, Wanted
from control.instance_spec import InstanceSpec, spec_of


@dataclass(frozen=True, slots=True)
class Running:
    """A group of ranks that an ``agent`` has told of.

    Attributes:
        node: of the agent; epoch: that the group is in.
        group: None where only ports are left, with their weights.
    """

    node: str
    spec: InstanceSpec
    group: Pid | None
    epoch: int


@dataclass(slots=True)
class Verdict:
    """What to do.

    Attributes:
        kept: records of what goes on, each with its group.
        idle: records of what may start again where it was: its ports hold the weights.
        missing: records of what is to be brought up.
        surplus: groups that have to end: an instance that runs twice, or was unloaded.
    """

    kept: list[tuple[Record, Pid]] = field(default_factory=list)
    idle: list[Record] = field(default_factory=list)
    missing: list[Record] = field(default_factory=list)
    surplus: list[Running] = field(default_factory=list)


def running_of(node: str, term: Any) -> list[Running]:
    """Read the answer of an agent's ``running``. Raises ValueError."""
    match term:
        case ("ok", [*rows]):
            return [_running(node, row) for row in rows]
    raise ValueError(f"{node} did not say what runs there: {term!r}"[:300])


def _running(node: str, row: Any) -> Running:
    match row:
        case {"spec": spec, "group": group, "epoch": int(epoch)}:
            return Running(node, spec_of(spec), group if isinstance(group, Pid) else None, epoch)
    raise ValueError(f"{node}: not a group: {row!r}"[:300])


def reconcile(running: Iterable[Running], desired: Desired, known: Mapping[str, Record]) -> Verdict:
    """Compare what was told of with the books.

    What runs and is not wanted was brought up by a request, or came with a machine: it goes on
    until it is unloaded. What was unloaded while its machine was away ends.

    Args:
        running: groups, of one machine or all.
        known: records that there are already.
    """
    found, wanted_of = Verdict(), {wanted.id: wanted for wanted in desired.wanted}
    best: dict[str, Running] = {}
    for one in sorted(running, key=lambda r: (r.group is None, -r.epoch, r.node)):
        id_ = one.spec.id
        record = known.get(id_)
        if record is not None and record.state == "draining":
            continue  # its end is under way
        if one.group is None:
            if id_ not in best and record is None and id_ in wanted_of:
                best[id_] = one
            continue
        elsewhere = (
            record is not None
            and record.state != "failed"  # for want of what has just come back
            and (record.spec is None or record.spec.head_node != one.node)
        )
        if id_ in best or elsewhere or (id_ in desired.gone and record is None):
            found.surplus.append(one)
        else:
            best[id_] = one
    for id_, one in best.items():
        record = known.get(id_) or Record(
            id_,
            one.spec.model,
            wanted_of.get(id_) or Wanted(id_, one.spec.model),
            on_demand=id_ not in wanted_of,
            ever_ready=True,
        )
        record.state = "recovering"
        # Not the epoch of a place that was looked for and not found: this one's words count.
        record.epoch, record.spec = one.epoch, one.spec
        record.taken = taken_by(one.spec)
        if one.group is None:
            found.idle.append(record)
        else:
            found.kept.append((record, one.group))
    found.missing = [
        Record(wanted.id, wanted.model, wanted, ever_ready=True)
        for wanted in desired.wanted
        if wanted.id not in best and wanted.id not in known
    ]
    return found


def taken_by(spec: InstanceSpec) -> dict[tuple[str, str], int]:
    """Memory of an instance, in bytes by node and pool."""
    taken: dict[tuple[str, str], int] = {}
    for rank in spec.ranks:
        key = (rank.node, rank.pool)
        taken[key] = taken.get(key, 0) + rank.memory_bytes
    return taken
