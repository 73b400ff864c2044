"""The desired state: which models should run in which shape. Small, versioned, on disk.

Actual state is what the ports say; this is what it is compared with after a restart.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from control.errors import ControlError
from control.load_options import BadOption, LoadOptions

log = logging.getLogger("control.desired")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One instance that should run."""

    id: str
    model: str  # what the user named: card id, path or hf: reference
    options: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True, slots=True)
class Desired:
    """The document. ``version`` grows by one with every change."""

    version: int = 0
    default: str = ""  # model that the alias ``default`` names
    wanted: tuple[Wanted, ...] = field(default=())

    def add(self, wanted: Wanted) -> Desired:
        kept = tuple(w for w in self.wanted if w.id != wanted.id)
        return replace(self, version=self.version + 1, wanted=(*kept, wanted))

    def remove(self, instance: str) -> Desired:
        kept = tuple(w for w in self.wanted if w.id != instance)
        return replace(self, version=self.version + 1, wanted=kept)

    def with_default(self, model: str) -> Desired:
        return replace(self, version=self.version + 1, default=model)


class BadDesired(ControlError):
    """The file exists but is not a desired state."""

    kind = "bad_state_file"

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return (
            f"cannot read the desired state {self.path}: {self.why}. Move the file away to "
            f"start with no models, then load them again."
        )


def read_desired(path: Path) -> Desired:
    """The document at ``path``; an empty one where there is no file. Raises BadDesired."""
    try:
        raw = json.loads(path.read_text())
        wanted = tuple(
            Wanted(str(w["id"]), str(w["model"]), LoadOptions.from_term(w["options"]))
            for w in raw["wanted"]
        )
        return Desired(int(raw["version"]), str(raw["default"]), wanted)
    except FileNotFoundError:
        return Desired()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadOption) as exc:
        raise BadDesired(path, f"{type(exc).__name__}: {exc}") from exc


def write_desired(path: Path, desired: Desired) -> None:
    """Replace the document atomically; it is on the disk when this returns. Raises OSError."""
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        json.dump(asdict(desired), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class DesiredFile:
    """The document and its file: what is saved counts at once, even if the disk refuses it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.now = Desired()

    def read(self) -> None:
        """Take what the file says. Raises BadDesired."""
        self.now = read_desired(self._path)

    def save(self, desired: Desired) -> None:
        """Make ``desired`` the document."""
        self.now = desired
        try:
            write_desired(self._path, desired)
        except OSError as exc:
            log.error("cannot write %s: %s; the change is lost at a restart", self._path, exc)
