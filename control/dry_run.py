"""The dry run of ``ctl place``: which placement a load would get, and why no other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Term
from control.choose import choose
from control.errors import ControlError, NotReady
from control.fleet import Fleet
from control.load_options import LoadOptions
from control.placement_request import Defaults, Request
from control.placement_term import placement_term
from models.card import Card
from models.card_spec import kind_of_card, spec_of_card
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A load that might be.

    Attributes:
        path: of the model's files; None where they are not here, and ``card`` has to do.
        fleet: with what runs taken off, and who has the files.
    """

    model: str
    path: Path | None
    card: Card | None
    options: LoadOptions
    defaults: Defaults
    fleet: Fleet


async def answer(me: Process, question: Question, from_: Term) -> None:
    """Reply to the caller ``from_``: ``{ok, Map}`` or ``{error, Kind, Text}``."""
    try:
        found: Term = (Atom("ok"), await asyncio.to_thread(_decide, question))
    except (ModelError, ControlError) as exc:
        found = (Atom("error"), Atom(exc.kind), str(exc))
    gen_server.reply(me, from_, found)


def _decide(question: Question) -> dict[Any, Term]:
    card = question.card
    stored: Checkpoint | None = None
    if question.path is not None:
        stored = open_checkpoint(question.path)
        spec, kind, size_bytes = stored.spec, "", stored.size_bytes
    elif card is not None:
        spec, kind, size_bytes = spec_of_card(card), kind_of_card(card), card.size_bytes
    else:
        why = "it is not downloaded, and no card says what it is like; `ctl model pull` it first"
        raise NotReady(question.model, why, kind="not_downloaded")
    request = Request.of(question.model, question.options, spec, question.defaults)
    fleet = question.fleet
    placement = choose(request, fleet, spec, stored, kind, goal=question.options.goal)
    return {
        Atom("model"): question.model,
        Atom("state"): Atom("remote" if stored is None else "local"),
        Atom("size_bytes"): size_bytes,
        Atom("assumed"): kind,  # storage format; empty where it was read
        **placement_term(placement, fleet),
    }
