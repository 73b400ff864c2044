"""The scheduler's books: one record an instance, and what they say about a question. Pure.

Nothing here sends, waits or looks at a clock; the scheduler does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bridge.term import Atom, Pid, Ref, Term
from control.desired import Desired, Wanted
from control.instance_spec import InstanceSpec, describe_shape, describe_spec
from control.load_options import MeshShape
from control.moves import Tenant

COMING_UP = ("pulling", "loading", "recovering")  # states that a request waits for
RUNNING = ("loading", "recovering", "ready")  # that have processes


@dataclass(slots=True)
class Record:
    """The entry of one instance.

    Attributes:
        on_demand: a request brought it up; nobody asked for it to be kept.
        retry: it failed for want of machines or memory: it may come up when there are more.
        taken: memory that it was placed with, in bytes by node and pool.
        worker: process that brings it up or takes it down.
        group: monitor of its supervisor.
        reply_to: who waits for the answer of ``load``; ``leavers``: of ``unload``.
        unsaved: unloads that are not on a quorum's disks yet.
    """

    id: str
    model: str
    wanted: Wanted
    on_demand: bool = False
    state: str = "pulling"
    text: str = ""
    epoch: int = 0
    ever_ready: bool = False
    retry: bool = False
    spec: InstanceSpec | None = None
    taken: dict[tuple[str, str], int] = field(default_factory=dict)
    coordinator: Pid | None = None
    worker: Pid | None = None
    group: Ref | None = None
    reply_to: Term = None
    leavers: list[Term] = field(default_factory=list)
    unsaved: int = 0

    def describe(self) -> dict[Any, Term]:
        """The instance's map as far as the books know it; its coordinator knows more."""
        known = (
            describe_spec(self.spec)
            if self.spec
            else {
                Atom("id"): self.id,
                Atom("model"): self.model,
                **describe_shape(
                    self.wanted.options.shape() or MeshShape.even(1, 1),
                    self.wanted.options.engine or "torch",
                ),
            }
        )
        return {
            **known,
            Atom("state"): Atom(self.state),
            Atom("text"): self.text,
            Atom("epoch"): self.epoch,
            Atom("restarts"): max(0, self.epoch - 1),
            Atom("active_requests"): 0,
            Atom("ranks"): [],
        }


@dataclass(frozen=True, slots=True)
class ComingUp:
    """It is worth waiting."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Every instance of the model failed."""

    text: str


@dataclass(frozen=True, slots=True)
class Absent:
    """No instance of the model is there."""


class Books:
    """All records."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def __contains__(self, instance: str) -> bool:
        return instance in self._records

    def get(self, instance: str) -> Record | None:
        return self._records.get(instance)

    def add(self, record: Record) -> None:
        self._records[record.id] = record

    def remove(self, instance: str) -> None:
        self._records.pop(instance, None)

    def used(self, but: str = "") -> dict[tuple[str, str], int]:
        """Memory that every instance but one was placed with, in bytes by node and pool."""
        total: Counter[tuple[str, str]] = Counter()
        for record in self:
            if record.state != "failed" and record.id != but:
                total.update(record.taken)
        return dict(total)

    def nodes_of(self, model: str, but: str) -> set[str]:
        """Machines that run, or will, an instance of ``model`` other than ``but``."""
        return {
            node
            for record in self
            if record.model == model and record.id != but and record.state != "failed"
            for node, _ in record.taken
        }

    def tenants(self, but: str) -> list[Tenant]:
        """Every instance but one that runs, as what might make room."""
        return [
            Tenant(
                id=record.id,
                node=record.spec.head_node,
                wanted=not record.on_demand,
                priority=record.wanted.options.priority,
                bytes=dict(record.taken),
            )
            for record in self
            if record.id != but and record.spec is not None and record.state in RUNNING
        ]

    def ids(self) -> list[str]:
        return list(self._records)

    def first(self, condition: Callable[[Record], bool]) -> Record | None:
        """The oldest record that meets ``condition``."""
        return next((record for record in self if condition(record)), None)

    def new_id(self, model: str, desired: Desired, others: Iterable[str] = ()) -> str:
        """``<model>-N``, free in the books, in the desired state and among ``others``."""
        last = model.rstrip("/").rpartition("/")[2]  # of a path or a hub reference
        slug = "".join(c if c.isalnum() or c in "-._" else "-" for c in last.lower()).strip("-")
        taken = {*self._records, *(wanted.id for wanted in desired.wanted), *others}
        number = 1
        while f"{slug}-{number}" in taken:
            number += 1
        return f"{slug}-{number}"

    def target_of(self, name: str) -> str | None:
        """What ``outlook`` takes for an instance's id, a loaded model's id or its reference."""
        if name in self:
            return name
        record = self.first(lambda r: name in (r.model, r.wanted.model))
        return record.model if record else None

    def outlook(self, model: str) -> ComingUp | Failed | Absent:
        """Whether ``model`` is worth waiting for: any of its instances, or the one it names."""
        mine = [record for record in self if model in (record.id, record.model)]
        if any(r.state in COMING_UP or r.state == "ready" for r in mine):
            return ComingUp()
        failed = [record for record in mine if record.state == "failed"]
        return Failed(f"instance {failed[0].id}: {failed[0].text}") if failed else Absent()
