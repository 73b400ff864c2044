"""Model cards: what the catalogue knows of a model before any of it is on disk."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import BadCard
from models.spec_hf import FAMILIES

CARDS_DIR = Path(__file__).parent / "cards"
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagePart:
    """A file inside a wheel of the package index."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSource:
    """A model file carried by packages; several parts are joined in order.

    Attributes:
        file: name of the resulting file.
        size_bytes, sha256: of the resulting file.
    """

    file: str
    size_bytes: int
    sha256: str
    parts: tuple[PackagePart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository of the Hugging Face hub.

    Attributes:
        files: glob patterns of the files to take.
        size_bytes: approximate sum of them.
    """

    repo: str
    revision: str
    files: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSource:
    """A file or folder on this machine; ``~`` stands for the home."""

    path: str


Source = PackageSource | HubSource | PathSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that a memory estimate needs; the same meaning as in ModelSpec."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One model of the catalogue.

    Attributes:
        id: lower-case, unique; what users type.
        aliases: other names for it.
        family: as in ModelSpec.
        license: SPDX id, or the name of the licence.
        parameters: number of weights.
        context_length: tokens.
        size_bytes: approximate download of the first source.
        chat: it follows instructions and has a chat template.
        sources: tried in order.
    """

    id: str
    name: str
    family: str
    license: str
    parameters: int
    context_length: int
    size_bytes: int
    chat: bool
    shape: Shape
    aliases: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()


def load_cards(extra_dirs: Iterable[Path] = ()) -> dict[str, Card]:
    """All cards by id: the built-in ones, then those of ``extra_dirs``, which may replace them.

    Raises:
        BadCard: a card that cannot be read, or two cards with one name; names file and field.
    """
    cards: dict[str, Card] = {}
    for folder in (CARDS_DIR, *extra_dirs):
        for path in sorted(folder.glob("*.toml")):
            card = load_card(path)
            cards[card.id] = card
    owner: dict[str, str] = {}
    for card in cards.values():
        for name in (card.id, *card.aliases):
            if owner.setdefault(name.lower(), card.id) != card.id:
                raise BadCard(f"cards {owner[name.lower()]} and {card.id} both claim {name!r}")
    return cards


def find_card(cards: Mapping[str, Card], name: str) -> Card | None:
    """The card with this id or alias, whatever its case; None if there is none."""
    wanted = name.lower()
    return next(
        (
            card
            for card in cards.values()
            if wanted in (card.id, *(a.lower() for a in card.aliases))
        ),
        None,
    )


def load_card(path: Path) -> Card:
    """Read one card. Raises BadCard naming file and field."""
    try:
        table = _Table(path, "", tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise BadCard(f"{path}: {exc}") from exc
    sources = tuple(_source(part) for part in table.tables("sources"))
    if not sources:
        raise BadCard(f"{path}: sources: at least one is needed")
    shape = table.table("shape")
    card = Card(
        id=table.text("id", _ID),
        name=table.text("name"),
        family=table.text("family"),
        license=table.text("license"),
        parameters=table.count("parameters"),
        context_length=table.count("context_length"),
        size_bytes=next((s.size_bytes for s in sources if not isinstance(s, PathSource)), 0),
        chat=table.flag("chat"),
        shape=Shape(**{name: shape.count(name) for name in Shape.__dataclass_fields__}),
        aliases=table.texts("aliases"),
        sources=sources,
    )
    if card.family not in FAMILIES.values():
        raise BadCard(
            f"{path}: family: {card.family!r} is none of {sorted(set(FAMILIES.values()))}"
        )
    shape.done()
    table.done()
    return card


def _source(table: _Table) -> Source:
    kind = table.text("kind")
    source: Source
    match kind:
        case "package":
            source = PackageSource(
                file=table.text("file", re.compile(r"[\w.-]+\.gguf")),
                size_bytes=table.count("size_bytes"),
                sha256=table.text("sha256", _SHA256),
                parts=tuple(_part(part) for part in table.tables("parts")),
            )
            if not source.parts:
                raise BadCard(f"{table.where('parts')}: at least one is needed")
        case "hub":
            source = HubSource(
                repo=table.text("repo", re.compile(r"[\w.-]+/[\w.-]+")),
                revision=table.text("revision"),
                files=table.texts("files"),
                size_bytes=table.count("size_bytes"),
            )
        case "path":
            source = PathSource(path=table.text("path"))
        case _:
            raise BadCard(f"{table.where('kind')}: {kind!r} is none of package, hub, path")
    table.done()
    return source


def _part(table: _Table) -> PackagePart:
    part = PackagePart(
        package=table.text("package"),
        version=table.text("version"),
        wheel_sha256=table.text("wheel_sha256", _SHA256),
        member=table.text("member"),
        member_sha256=table.text("member_sha256", _SHA256),
    )
    table.done()
    return part


class _Table:
    """One TOML table; remembers which fields were read, so that others are refused."""

    def __init__(self, path: Path, prefix: str, values: Mapping[str, Any]) -> None:
        self.path, self.prefix, self.values = path, prefix, values
        self.read: set[str] = set()

    def where(self, field: str) -> str:
        return f"{self.path}: {self.prefix}{field}"

    def _get(self, field: str, kind: type, default: Any = None) -> Any:
        self.read.add(field)
        value = self.values.get(field, default)
        if value is None:
            raise BadCard(f"{self.where(field)}: is missing")
        if type(value) is not kind:
            raise BadCard(f"{self.where(field)}: must be {kind.__name__}, not {value!r}")
        return value

    def text(self, field: str, form: re.Pattern[str] | None = None) -> str:
        value: str = self._get(field, str)
        if not value or (form is not None and form.fullmatch(value) is None):
            raise BadCard(f"{self.where(field)}: {value!r} has the wrong form")
        return value

    def count(self, field: str) -> int:
        value: int = self._get(field, int)
        if value <= 0:
            raise BadCard(f"{self.where(field)}: {value} is not positive")
        return value

    def flag(self, field: str) -> bool:
        value: bool = self._get(field, bool)
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        values = self._get(field, list, [])
        if not all(isinstance(value, str) and value for value in values):
            raise BadCard(f"{self.where(field)}: must be a list of texts")
        return tuple(values)

    def table(self, field: str) -> _Table:
        return _Table(self.path, f"{self.prefix}{field}.", self._get(field, dict))

    def tables(self, field: str) -> list[_Table]:
        values = self._get(field, list, [])
        if not all(isinstance(value, dict) for value in values):
            raise BadCard(f"{self.where(field)}: must be a list of tables")
        return [
            _Table(self.path, f"{self.prefix}{field}[{n}].", value)
            for n, value in enumerate(values)
        ]

    def done(self) -> None:
        unknown = sorted(self.values.keys() - self.read)
        if unknown:
            raise BadCard(f"{self.where(unknown[0])}: unknown field")
