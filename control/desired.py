"""The desired state: which models should run in which shape. Small, versioned, on disk.

Actual state is what the ports say; this is what it is compared with after a restart.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from bridge.show import show
from bridge.term import Atom, Term
from bridge.text import text_of
from control.desired_sync import Disk, Document
from control.errors import ControlError
from control.keys import (
    MAX_KEYS,
    MAX_REVOKED,
    ApiKey,
    BadKey,
    NoSuchKey,
    TooManyKeys,
    key_of,
    key_term,
)
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
        keys: of the HTTP API.
        revoked: ids of keys that were revoked last, so that no machine that was away brings one
            back; and a sign that there were keys.
    """

    version: int = 0
    default: str = ""
    wanted: tuple[Wanted, ...] = field(default=())
    gone: tuple[str, ...] = ()
    keys: tuple[ApiKey, ...] = ()
    revoked: tuple[str, ...] = ()

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

    def add_key(self, key: ApiKey) -> Desired:
        """Raises TooManyKeys, BadKey."""
        if len(self.keys) >= MAX_KEYS:
            raise TooManyKeys
        if key.id in self.revoked or any(known.id == key.id for known in self.keys):
            raise BadKey(f"id: there is or was a key {key.id}; make another")
        return replace(self, version=self.version + 1, keys=(*self.keys, key))

    def revoke_key(self, id_: str) -> Desired:
        """Raises NoSuchKey."""
        kept = tuple(key for key in self.keys if key.id != id_)
        if len(kept) == len(self.keys):
            raise NoSuchKey(id_)
        revoked = (*self.revoked, id_)[-MAX_REVOKED:]
        return replace(self, version=self.version + 1, keys=kept, revoked=revoked)

    def without_models(self) -> Desired:
        """Nothing is to run; whom the API is open to stays."""
        return Desired(self.version + 1, keys=self.keys, revoked=self.revoked)

    def _with_keys_of(self, other: Desired) -> Desired:
        """The keys of both; what one of them revoked is revoked."""
        revoked = tuple(dict.fromkeys((*other.revoked, *self.revoked)))[-MAX_REVOKED:]
        known = {key.id: key for key in (*other.keys, *self.keys) if key.id not in revoked}
        return replace(self, keys=tuple(known.values())[-MAX_KEYS:], revoked=revoked)

    def merged(self, other: Desired) -> Desired:
        """With what another cluster wanted, which has become part of this one."""
        merged = self
        if other.keys or other.revoked:
            joined = self._with_keys_of(other)
            if set(joined.keys) != set(self.keys) or set(joined.revoked) != set(self.revoked):
                merged = joined
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
    plain = (desired.default, wanted, list(desired.gone))
    if not desired.keys and not desired.revoked:
        return plain
    more: dict[Term, Term] = {
        Atom("keys"): [key_term(key) for key in desired.keys],
        Atom("revoked"): list(desired.revoked),
    }
    return (*plain, more)


def desired_of(document: Document) -> Desired:
    """Read ``body_term``'s answer, also that of a version without keys.

    Raises:
        ValueError, BadOption.
    """
    version, body = document.stamp[1], document.body
    match body:
        case ():
            return Desired(version)
        case (default, [*wanted], [*gone]):
            return _desired(version, default, wanted, gone, {})
        case (default, [*wanted], [*gone], dict(more)):
            return _desired(version, default, wanted, gone, more)
    raise ValueError(f"not a desired state: {show(body, 300)}")


def _desired(
    version: int, default: Term, wanted: list[Any], gone: list[Any], more: dict[Any, Any]
) -> Desired:
    rows = tuple(_wanted_of(row) for row in wanted)
    keys, revoked = more.get("keys", []), more.get("revoked", [])
    return Desired(
        version, text_of(default), rows, tuple(map(text_of, gone)), _keys(keys), _texts(revoked)
    )


def _keys(rows: Any) -> tuple[ApiKey, ...]:
    """Raises ValueError: one key that cannot be read makes the whole document unreadable."""
    try:
        return tuple(key_of(row) for row in rows)
    except BadKey as exc:
        raise ValueError(str(exc)) from exc


def _texts(rows: Any) -> tuple[str, ...]:
    return tuple(map(text_of, rows))


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
        keys, revoked = _keys(raw.get("keys", ())), _texts(raw.get("revoked", ()))
        version, default = int(raw["version"]), str(raw["default"])
        desired = Desired(version, default, wanted, gone, keys, revoked)
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
    with open(temporary, "w", opener=_private) as file:
        json.dump(raw, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _private(path: str, flags: int) -> int:
    """For this user alone: who has keys is nobody else's business."""
    return os.open(path, flags, 0o600)
