"""The registered process ``election``: who leads, and since which epoch.

The epoch is kept on disk and grows with every won election, so that a command of an
older leader can be told and refused. A cluster of one machine elects itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from bridge.gen_server import GenServer
from bridge.process import Process
from bridge.term import Atom, Term

log = logging.getLogger("control.election")


@dataclass(frozen=True, slots=True)
class Leadership:
    """Result of an election; an empty ``leader`` means that nobody may lead."""

    leader: str
    epoch: int


def elect_alone(node: str, *, candidate: bool, last_epoch: int) -> Leadership:
    """The election of a cluster of one: the machine leads if it has the coordinator role."""
    return Leadership(node if candidate else "", last_epoch + candidate)


class Election(GenServer):
    """Answers ``leader`` with ``{ok, Node}`` or ``{error, no_leader}``, ``epoch`` with a number.

    Args:
        epoch_path: file with the epoch of the last election.
        candidate: this machine has the coordinator role.
    """

    def __init__(self, epoch_path: Path, *, candidate: bool) -> None:
        super().__init__()
        self._path, self._candidate = epoch_path, candidate
        self.leadership = Leadership("", 0)

    def format_state(self) -> Term:
        return {
            Atom("leader"): Atom(self.leadership.leader or "undefined"),
            Atom("epoch"): self.leadership.epoch,
        }

    async def init(self, me: Process) -> None:
        last_epoch = _read_epoch(self._path)
        self.leadership = elect_alone(
            str(self.me.node.name), candidate=self._candidate, last_epoch=last_epoch
        )
        if self.leadership.epoch != last_epoch:
            temporary = self._path.with_suffix(".new")
            try:
                temporary.write_text(f"{self.leadership.epoch}\n")
                temporary.replace(self._path)
            except OSError as exc:  # a full disk must not cost the node
                log.error("cannot write %s: %s; this epoch may come again", self._path, exc)

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "leader" if self.leadership.leader:
                return (Atom("ok"), Atom(self.leadership.leader))
            case "leader":
                return (Atom("error"), Atom("no_leader"))
            case "epoch":
                return self.leadership.epoch
            case _:
                return await super().handle_call(request, from_)


def _read_epoch(path: Path) -> int:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as exc:
        log.error("%s does not hold a number (%s); elections start at epoch 1", path, exc)
        return 0
