"""Questions that take a while: where would a model run, and what is its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Term
from control import dry_run, model_files
from control.errors import ControlError
from control.fleet import read_fleet
from control.load_options import LoadOptions
from control.lookup import Lookup
from control.placement_request import Defaults
from models.card import Card


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What ``ctl place`` asks.

    Attributes:
        used: memory that instances take, in bytes by node and pool.
    """

    model: str
    lookup: Lookup
    options: LoadOptions
    defaults: Defaults
    used: Mapping[tuple[str, str], int]


async def answer(question: Question, from_: Term, me: Process) -> None:
    """Reply to the caller ``from_``: ``{ok, Map}`` or ``{error, Kind, Text}``."""
    model, here = question.model, str(me.node.name)
    try:
        fleet = await read_fleet(me)
        located = await model_files.locate(me.node, model, fleet.nodes)
        sources = model_files.best_sources(located, fleet.roles, here)
        path = await model_files.header(me.node, model, located, sources) if sources else None
        asked = dry_run.Question(
            model=model,
            path=path,
            card=_card(question),
            options=question.options,
            defaults=question.defaults,
            fleet=fleet.with_used(question.used).with_files(sources),
        )
    except ControlError as exc:
        gen_server.reply(me, from_, (Atom("error"), Atom(exc.kind), str(exc)))
    except gen_server.CallError as exc:
        gen_server.reply(me, from_, (Atom("error"), Atom("internal_error"), str(exc)))
    else:
        await dry_run.answer(me, asked, from_)


def _card(question: Question) -> Card | None:
    try:
        return question.lookup.resolve(question.model).card
    except ControlError:  # the files of another machine
        return None


async def bring_header(
    target: str,
    model: str,
    context_tokens: int,
    nodes: Sequence[str],
    from_: Term,
    me: Process,
) -> None:
    """Reply ``{ok, Target, Path, ContextTokens}``: what to read the tokenizer of ``model`` from.

    Args:
        nodes: machines that may have the files, the likeliest first.
    """
    try:
        path = await _header(me, model, nodes)
    except ControlError as exc:
        gen_server.reply(me, from_, (Atom("error"), Atom(exc.kind), str(exc)))
        return
    gen_server.reply(me, from_, (Atom("ok"), target, str(path), context_tokens))


async def _header(me: Process, model: str, nodes: Sequence[str]) -> Path:
    here = str(me.node.name)
    located = await model_files.locate(me.node, model, [here])
    if not located[here].whole:  # else nobody need be asked
        located = await model_files.locate(me.node, model, nodes)
    sources = [node for node in nodes if node in located and located[node].whole]
    return await model_files.header(me.node, model, located, sources)
