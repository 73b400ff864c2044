"""What the scheduler may know of models: names to ids, files and cards. No network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.card import Card


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model reference, looked up.

    Attributes:
        path: of its files, where they are on this machine.
        card: what is known of it where they are not.
    """

    id: str
    ref: str
    path: Path | None
    card: Card | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the scheduler may know of models; neither function uses the network.

    Attributes:
        resolve: an operator's reference, paths included; raises UnknownModel.
        card_of: card id or alias -> card id; raises UnknownModel. Looks at no file, since the
            names it is given come from clients.
    """

    resolve: Callable[[str], Resolved]
    card_of: Callable[[str], str]
