"""The desired state: which models should run in which shape. Small, versioned, on disk.

Actual state is what the ports say; this is what it is compared with after a restart.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from bridge.term import Term
from bridge.text import text_of
from control.desired_sync import Disk, Document
from control.errors import ControlError
from control.load_options import BadOption, LoadOptions

MOST_GONE: Final = 64  # instances that are remembered to be unwanted


@dataclass(frozen=True, slots=True)
class Wanted:
    """One instance that should run."""

    id: str
    model: str  # what the user named: card id, path or hf: reference
    options: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True, slots=True)
class Desired:
    """The document. ``version`` grows by one with every change.

    Attributes:
        default: model that the alias ``default`` names.
        gone: instances that were unloaded last: a machine that was away may still run them.
    """

    version: int = 0
    default: str = ""
    wanted: tuple[Wanted, ...] = field(default=())
    gone: tuple[str, ...] = ()

    def add(self, wanted: Wanted) -> Desired:
        kept = tuple(w for w in self.wanted if w.id != wanted.id)
        gone = tuple(id_ for id_ in self.gone if id_ != wanted.id)
        return replace(self, version=self.version + 1, wanted=(*kept, wanted), gone=gone)

    def remove(self, instance: str) -> Desired:
        kept = tuple(w for w in self.wanted if w.id != instance)
        gone = (*(id_ for id_ in self.gone if id_ != instance), instance)[-MOST_GONE:]
        return replace(self, version=self.version + 1, wanted=kept, gone=gone)

    def with_default(self, model: str) -> Desired:
        return replace(self, version=self.version + 1, default=model)

    def merged(self, other: Desired) -> Desired:
        """With what another cluster wanted, which has become part of this one."""
        merged = self
        for wanted in other.wanted:
            if not merged.has(wanted.id) and wanted.id not in merged.gone:
                merged = merged.add(wanted)
        if not merged.default and other.default:
            merged = merged.with_default(other.default)
        return self if merged == self else replace(merged, version=self.version + 1)

    def has(self, instance: str) -> bool:
        """Whether it should run."""
        return any(w.id == instance for w in self.wanted)


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


# -- as a term, between machines -----------------------------------------------------------


def body_term(desired: Desired) -> Term:
    """What a replicated document holds; its version is in the document's stamp."""
    wanted: list[Term] = [
        (w.id, w.model, json.dumps(_changed(w.options), sort_keys=True)) for w in desired.wanted
    ]
    return (desired.default, wanted, list(desired.gone))


def desired_of(document: Document) -> Desired:
    """Read ``body_term``'s answer. Raises ValueError, BadOption."""
    version, body = document.stamp[1], document.body
    match body:
        case ():
            return Desired(version)
        case (default, [*wanted], [*gone]):
            rows = [_wanted_of(row) for row in wanted]
            return Desired(version, text_of(default), tuple(rows), tuple(map(text_of, gone)))
    raise ValueError(f"not a desired state: {body!r}")


def _wanted_of(row: Any) -> Wanted:
    match row:
        case (id_, model, options):
            found = json.loads(text_of(options))
            if isinstance(found, dict):
                return Wanted(text_of(id_), text_of(model), LoadOptions.from_term(found))
    raise ValueError(f"not a wanted instance: {row!r}")


def _changed(options: LoadOptions) -> dict[str, Any]:
    """What was asked for; a newer machine may know more options than an older one."""
    plain = asdict(LoadOptions())
    return {name: value for name, value in asdict(options).items() if value != plain[name]}


# -- on disk -------------------------------------------------------------------------------


def read_desired(path: Path) -> Desired:
    """The document at ``path``; an empty one where there is no file. Raises BadDesired."""
    return desired_of(read_disk(path).document)


def read_disk(path: Path) -> Disk:
    """The document at ``path``, its epoch and the fence. Raises BadDesired."""
    try:
        raw = json.loads(path.read_text())
        wanted = tuple(
            Wanted(str(w["id"]), str(w["model"]), LoadOptions.from_term(w["options"]))
            for w in raw["wanted"]
        )
        gone = tuple(map(str, raw.get("gone", ())))
        desired = Desired(int(raw["version"]), str(raw["default"]), wanted, gone)
        stamp = (int(raw.get("epoch", 0)), desired.version)
        return Disk(int(raw.get("fence", 0)), Document(stamp, body_term(desired)))
    except FileNotFoundError:
        return Disk()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadOption) as exc:
        raise BadDesired(path, f"{type(exc).__name__}: {exc}") from exc


def write_disk(path: Path, disk: Disk) -> None:
    """Replace the document atomically; it is on the disk when this returns. Raises OSError."""
    raw = {
        "fence": disk.fence,
        "epoch": disk.document.stamp[0],
        **asdict(desired_of(disk.document)),
    }
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        json.dump(raw, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
