"""What one machine tells another that asks for a model: its files, and where to get them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bridge.show import show
from bridge.term import Atom, Term
from bridge.text import text_of
from control.peer_files.chunks import CHUNK_BYTES

TOKEN_BYTES: Final = 32
MAX_FILES: Final = 10_000
MAX_FILE_BYTES: Final = 1 << 50
_NAME: Final = re.compile(r"[^\\/\0:.][^\\/\0:]*")

FileRanges = Mapping[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model as a peer has it.

    Attributes:
        main: the file to open, relative to the model's folder; empty for the folder itself.
        files: names and sizes in bytes.
        fingerprint: ``Checkpoint.fingerprint``; equal for equal models.
        header: what it takes to open the model.
        have: what the peer has of it; None for all.
        doors: where its files are served.
        tokens: each admits one connection, once.
    """

    id: str
    main: str
    files: tuple[tuple[str, int], ...]
    fingerprint: str
    header: FileRanges
    have: FileRanges | None = None
    doors: tuple[tuple[str, int], ...] = ()
    tokens: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)

    def is_same_model(self, other: Offer) -> bool:
        """Whether the chunks of both can be mixed."""
        return (self.main, self.files, self.fingerprint) == (
            other.main,
            other.files,
            other.fingerprint,
        )


def offer_term(offer: Offer) -> dict[Any, Term]:
    """``offer`` as a message; ``offer_of`` reads it."""
    term: dict[Any, Term] = {
        Atom("id"): offer.id,
        Atom("main"): offer.main,
        Atom("files"): [(name, size) for name, size in offer.files],
        Atom("chunk_bytes"): CHUNK_BYTES,
        Atom("fingerprint"): offer.fingerprint,
        Atom("header"): ranges_term(offer.header),
        Atom("doors"): [(host, port) for host, port in offer.doors],
        Atom("tokens"): list(offer.tokens),
    }
    if offer.have is not None:
        term[Atom("have")] = ranges_term(offer.have)
    return term


def offer_of(term: Term) -> Offer:
    """The offer in what a peer answered. Raises ValueError for what cannot be or must not be."""
    match term:
        case {
            "id": bytes() | str() as id_,
            "main": bytes() | str() as main,
            "files": [*files],
            "chunk_bytes": int(chunk_bytes),
            "fingerprint": bytes() | str() as fingerprint,
            "header": dict(header),
            "doors": [*doors],
            "tokens": [*tokens],
        } if len(files) <= MAX_FILES:
            if chunk_bytes != CHUNK_BYTES:
                raise ValueError(f"chunks of {chunk_bytes} bytes, not {CHUNK_BYTES}")
            sizes = dict(_file(one) for one in files)
            have = term.get(Atom("have"))
            if main and text_of(main) not in sizes:
                raise ValueError(f"{show(main, 80)} is none of its files")
            return Offer(
                id=text_of(id_),
                main=text_of(main),
                files=tuple(sorted(sizes.items())),
                fingerprint=text_of(fingerprint),
                header=_known(ranges_of(header), sizes),
                have=None if have is None else _known(ranges_of(have), sizes),
                doors=tuple(_door(one) for one in doors),
                tokens=tuple(one for one in tokens if isinstance(one, bytes)),
            )
        case _:
            raise ValueError(f"no offer: {show(term, 120)}")


def ranges_term(files: FileRanges) -> dict[Any, Term]:
    """``#{File => [{Start, Stop}]}``."""
    return {name: [(start, stop) for start, stop in ranges] for name, ranges in files.items()}


def ranges_of(term: Term) -> FileRanges:
    """The same, read. Raises ValueError."""
    if not isinstance(term, dict):
        raise ValueError(f"expected files and ranges, got {show(term, 120)}")
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for name, ranges in term.items():
        if not isinstance(name, bytes | str) or not isinstance(ranges, list):
            raise ValueError(f"expected a file and its ranges, got {show((name, ranges), 120)}")
        found[text_of(name)] = tuple(_range(one) for one in ranges)
    return found


def _range(term: Term) -> tuple[int, int]:
    match term:
        case (int(start), int(stop)) if 0 <= start < stop <= MAX_FILE_BYTES:
            return start, stop
        case _:
            raise ValueError(f"expected {{Start, Stop}}, got {show(term, 80)}")


def _known(files: FileRanges, sizes: Mapping[str, int]) -> FileRanges:
    for name, ranges in files.items():
        if name not in sizes or (ranges and ranges[-1][1] > sizes[name]):
            raise ValueError(f"ranges of {name!r} that the file does not have")
    return files


def _file(term: Term) -> tuple[str, int]:
    """A name that stays inside its folder, whatever the system, and a size."""
    match term:
        case (bytes() | str() as raw, int(size)) if 0 <= size <= MAX_FILE_BYTES:
            name = text_of(raw)
            if len(name) <= 512 and all(_NAME.fullmatch(part) for part in name.split("/")):
                return name, size
    raise ValueError(f"a file that is not taken: {show(term, 80)}")


def _door(term: Term) -> tuple[str, int]:
    match term:
        case (bytes() | str() as host, int(port)) if 0 < port < 65536:
            return text_of(host), port
        case _:
            raise ValueError(f"expected {{Host, Port}}, got {show(term, 80)}")
