"""The desired state: which models should run in which shape. Small, versioned, on disk.

Actual state is what the ports say; this is what it is compared with after a restart.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bridge.show import show
from bridge.text import text_of
from control.errors import ControlError

MAX_SLOTS = 1024


class BadOption(ControlError):
    """A load option is unknown, of the wrong type, or cannot be honoured."""

    kind = "bad_option"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Shape of an instance; 0 or empty lets the cluster choose.

    Attributes:
        context: tokens a request may have, prompt and answer together.
        slots: requests served at once.
        tensor, pipeline: ranks in each direction.
        threads: CPU threads of a rank.
        device: ``cpu``, ``cuda:0``.
    """

    context: int = 0
    slots: int = 0
    tensor: int = 0
    pipeline: int = 0
    threads: int = 0
    engine: str = ""
    device: str = ""

    @staticmethod
    def from_term(options: Mapping[Any, Any]) -> LoadOptions:
        """Check a map of options. Raises BadOption with the option's name."""
        known = {f.name: f for f in fields(LoadOptions)}
        found: dict[str, Any] = {}
        for key, value in options.items():
            name = text_of(key)
            if name == "shares":
                raise BadOption(
                    "shares: uneven shares need more than one rank, which this version "
                    "does not place yet; leave it out"
                )
            if name not in known:
                raise BadOption(f"unknown option {name!r}; known: {', '.join(sorted(known))}")
            if known[name].type == "int":
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise BadOption(f"{name}: expected a number from 0, got {show(value, 60)}")
                found[name] = value
            else:
                if not isinstance(value, str | bytes):
                    raise BadOption(f"{name}: expected text, got {show(value, 60)}")
                found[name] = text_of(value)
        return LoadOptions(**found).checked()

    def checked(self) -> LoadOptions:
        """Raises BadOption for what this version cannot do."""
        for name in ("tensor", "pipeline"):
            if getattr(self, name) > 1:
                raise BadOption(
                    f"{name}={getattr(self, name)}: this version runs one rank an "
                    f"instance; leave it out or ask for 1"
                )
        if self.slots > MAX_SLOTS:
            raise BadOption(f"slots={self.slots}: at most {MAX_SLOTS}")
        if self.device and not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", self.device):
            raise BadOption(f"device={self.device!r}: give cpu, cuda or cuda:N")
        if self.engine not in ("", "torch"):
            raise BadOption(f"engine={self.engine!r}: this version has the engine 'torch'")
        return self


@dataclass(frozen=True, slots=True)
class Wanted:
    """One instance that should run."""

    id: str
    model: str  # what the user named: card id, path or hf: reference
    options: LoadOptions = LoadOptions()


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
