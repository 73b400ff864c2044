"""Which models there are and which lie on this disk: the layout of the store's folder.

::

    <root>/<model>/...              a whole model, with phalanx.json that says what it is
    <root>/.partial/<model>/<n>/    what of its n-th source has arrived so far
    <root>/.parts/<model>/          what peers have given of it, ``control.peer_files.part_copy``
    <root>/.digests/<model>/        of its chunks, for peers
    <root>/.locks/<model>.lock      held by the process that fetches it

A model's folder comes into being by one rename, so that what is there is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from control.errors import NotAModel, StoreUnusable, UnknownModel
from control.fetch import disk_errors
from control.store_room import Holding, taken_bytes, touch, touched_s
from models.card import Card, HubSource, PathSource, Source, find_card
from models.part_note import OWN_NOTES, PART_NOTE

MANIFEST = "phalanx.json"
NOTE = "progress.json"  # in the folder of a download: how far it is
_NOTES = (MANIFEST, f"files/{PART_NOTE}", NOTE)  # touched when a model is used
HUB = "hf:"
_HUB_FORM = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:/(.+))?")

State = Literal["local", "remote", "partial"]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A reference, looked up: ``id`` names the model everywhere, ``sources`` say where it is."""

    id: str
    sources: tuple[Source, ...]
    card: Card | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model of the catalogue. ``context_tokens`` is 0 and ``family`` empty if unknown."""

    id: str
    name: str
    family: str
    state: State
    size_bytes: int
    context_tokens: int = 0
    aliases: tuple[str, ...] = ()
    path: Path | None = None


def resolve(ref: str, cards: Mapping[str, Card]) -> ModelRef:
    """Card id or alias, ``hf:ORG/REPO[/FILE]``, or a path; looks at no network.

    Raises:
        UnknownModel: no card has this name.
        NotAModel: no such file, or not a form we take.
    """
    card = find_card(cards, ref)
    if card is not None:
        return ModelRef(card.id, card.sources, card)
    if ref.startswith(HUB):
        found = _HUB_FORM.fullmatch(ref)
        if found is None:
            raise NotAModel(ref, "a hub reference is hf:ORG/REPO or hf:ORG/REPO/FILE")
        files = (found[2],) if found[2] else ()
        return ModelRef(
            ref, (HubSource(repo=found[1], revision="main", files=files, size_bytes=0),)
        )
    path = Path(ref).expanduser()
    if path.is_absolute() or ref.startswith((".", "~")) or ref.lower().endswith(".gguf"):
        check_model_path(path, ref)
        return ModelRef(str(path.resolve()), (PathSource(path=str(path.resolve())),))
    raise UnknownModel(ref, tuple(cards))


def check_model_path(path: Path, ref: str) -> None:
    """Raise NotAModel unless a file, or a folder that could be a model, is there."""
    try:
        if path.is_file():
            return
        if not path.is_dir():
            raise NotAModel(ref, "there is no such file or folder")
        if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            raise NotAModel(ref, "the folder lacks config.json or *.safetensors")
    except OSError as exc:
        raise NotAModel(ref, exc.strerror or str(exc)) from exc
    except ValueError as exc:  # a NUL character
        raise NotAModel(ref, str(exc)) from exc


class Shelf:
    """The store's folder. Every method is a few system calls; none waits."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, model_id: str) -> Path:
        """Where the whole model is, or will be."""
        return self.root / slug(model_id)

    def work(self, model_id: str) -> Path:
        """Where it grows."""
        return self.root / ".partial" / slug(model_id)

    def parts(self, model_id: str) -> Path:
        """Where parts of it are that peers gave."""
        return self.root / ".parts" / slug(model_id)

    def notes(self, model_id: str) -> Path:
        """Where digests of it are kept."""
        return self.root / ".digests" / slug(model_id)

    def path_of_parts(self, model_id: str) -> Path | None:
        """What to open of a model of which parts are here; None where there are none."""
        return self._parts_in(self.parts(model_id))[0]

    def _parts_in(self, folder: Path) -> tuple[Path | None, str]:
        """What to open, and the model's id; ``(None, "")`` where there is nothing."""
        files = folder / "files"
        try:
            note = json.loads((files / PART_NOTE).read_text(encoding="utf-8"))
            return (files / note["main"] if note["main"] else files), str(note["id"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, ""

    def has_part(self, model_id: str) -> bool:
        """Whether something of a model has arrived that the next download can use."""
        if self.path_of_parts(model_id) is not None:
            return True
        return any(p.is_file() and p.name != NOTE for p in self.work(model_id).rglob("*"))

    def lock_file(self, model_id: str) -> Path:
        """Locked by whoever writes to the two. Raises StoreUnusable, DiskFull."""
        return self.lock_of(slug(model_id))

    def lock_of(self, folder: str) -> Path:
        """The same, by the name of the model's folder."""
        path = self.root / ".locks" / f"{folder}.lock"
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return path

    def stored(self, model_id: str) -> Path | None:
        """The GGUF file or folder to load, if the store has all of the model."""
        found = self._stored(self.folder(model_id))
        return found[0] if found is not None else None

    def path_of(self, ref: ModelRef) -> Path | None:
        """The GGUF file or folder to load, if the model is whole and on this machine."""
        found = self.stored(ref.id)
        if found is not None:
            return found
        for source in ref.sources:
            if isinstance(source, PathSource):
                path = Path(source.path).expanduser()
                with contextlib.suppress(NotAModel):
                    check_model_path(path, ref.id)
                    return path
        return None

    def publish(self, model_id: str, files: Path, source: str, *, main: str = "") -> Path:
        """Make the finished folder ``files`` the model; returns what to load.

        Args:
            main: the file of it to load; empty for the one GGUF file, or the whole folder.

        Raises:
            NotAModel: it holds nothing that can be loaded.
            DiskFull, StoreUnusable.
        """
        names = sorted(
            p.relative_to(files)
            for p in files.rglob("*")
            if p.is_file() and p.name not in OWN_NOTES
        )
        sizes = {name.as_posix(): (files / name).stat().st_size for name in names}
        ggufs = [name for name in sizes if name.lower().endswith(".gguf")]
        main = main or (ggufs[0] if len(ggufs) == 1 else "")
        if not main:
            check_model_path(files, model_id)
        manifest = {"id": model_id, "source": source, "main": main, "files": sizes}
        final = self.folder(model_id)
        with disk_errors(self.root):
            (files / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            if final.exists():  # a damaged one; a whole one would have been used
                shutil.rmtree(final)
            os.replace(files, final)
        return final / main

    def whole_instead_of_parts(self, model_id: str) -> None:
        """Drop the parts of a model that is whole now; who was told their path finds it there."""
        parts, whole = self.parts(model_id), self.folder(model_id)
        with contextlib.suppress(OSError):  # else that path is gone, and the next ask gives this
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
            os.symlink(whole.resolve(), parts / "files", target_is_directory=True)

    def remove(self, model_id: str) -> bool:
        """Delete what the store holds of a model; False if that was nothing."""
        return self.remove_folder(slug(model_id))

    def remove_folder(self, name: str) -> bool:
        """The same, by the name of the model's folder."""
        held = [base / name for base in self._bases() if (base / name).exists()]
        notes = self.root / ".digests" / name
        with disk_errors(self.root):
            for path in (*held, *((notes,) if notes.exists() else ())):
                shutil.rmtree(path)
        return bool(held)

    def holdings(self) -> list[Holding]:
        """What every model that lies here takes, and when it was last used. Raises OSError."""
        ids: dict[str, str] = {}  # folder name -> id
        for folder in _folders(self.root):
            stored = self._stored(folder)
            ids[folder.name] = stored[1]["id"] if stored else folder.name
        for folder in _folders(self.root / ".parts"):
            ids.setdefault(folder.name, self._parts_in(folder)[1] or folder.name)
        for folder in _folders(self.root / ".partial"):
            ids.setdefault(folder.name, folder.name)
        return [
            Holding(
                id_,
                name,
                sum(taken_bytes(base / name) for base in self._bases()),
                max(touched_s(base / name / note) for base in self._bases() for note in _NOTES),
            )
            for name, id_ in ids.items()
        ]

    def touch(self, model_id: str) -> None:
        """It is used now."""
        for base in self._bases():
            for note in _NOTES:
                touch(base / slug(model_id) / note)

    def _bases(self) -> tuple[Path, ...]:
        return self.root, self.root / ".parts", self.root / ".partial"

    def list(self, cards: Mapping[str, Card]) -> list[Entry]:
        """All cards, then everything else that lies in the store.

        Raises:
            StoreUnusable: the folder cannot be read.
        """
        entries = [self._card_entry(card) for card in cards.values()]
        try:
            folders = _folders(self.root)
            parts = _folders(self.root / ".parts")
        except OSError as exc:
            raise StoreUnusable(str(self.root), exc.strerror or str(exc)) from exc
        for folder in folders:
            stored = self._stored(folder)
            if stored is not None and stored[1]["id"] not in cards:
                path, manifest = stored
                entries.append(
                    Entry(
                        id=manifest["id"],
                        name=manifest["id"],
                        family="",
                        state="local",
                        size_bytes=sum(manifest["files"].values()),
                        path=path,
                    )
                )
        for folder in parts:
            at, id_ = self._parts_in(folder)
            if at is not None and id_ not in cards:
                size = sum(p.stat().st_size for p in (folder / "files").rglob("*") if p.is_file())
                entries.append(Entry(id=id_, name=id_, family="", state="partial", size_bytes=size))
        return entries

    def _card_entry(self, card: Card) -> Entry:
        path = self.path_of(ModelRef(card.id, card.sources, card))
        state: State = "local" if path else "partial" if self.has_part(card.id) else "remote"
        return Entry(
            id=card.id,
            name=card.name,
            family=card.family,
            state=state,
            size_bytes=card.size_bytes,
            context_tokens=card.context_length,
            aliases=card.aliases,
            path=path,
        )

    def _stored(self, folder: Path) -> tuple[Path, dict[str, Any]] | None:
        """What to load of a folder and its manifest; None where a file is missing or cut."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            whole = all(
                (folder / name).stat().st_size == size for name, size in manifest["files"].items()
            )
            return (folder / str(manifest["main"]), manifest) if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _folders(base: Path) -> list[Path]:
    """Folders of models. Raises OSError, not where there are none yet."""
    try:
        return sorted(p for p in base.iterdir() if not p.name.startswith("."))
    except FileNotFoundError:
        return []


def slug(model_id: str) -> str:
    """A file name for a model: itself where that is safe, else with a digest of it."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "--", model_id).strip(".")[:80]
    if safe and safe == model_id:
        return safe
    return f"{safe}-{hashlib.sha256(model_id.encode()).hexdigest()[:8]}"
