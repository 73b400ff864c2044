"""The dry run of ``ctl place``: which placement a load would get, and why no other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Term
from control.errors import ControlError, NotReady
from control.instance_spec import describe_shape
from control.load_options import LoadOptions
from control.placement import decide
from control.placement_request import Defaults, Host, Request
from control.placement_types import Candidate, Placement, RankPlace
from models.card import Card
from models.card_spec import kind_of_card, spec_of_card
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import ModelError

_UNDEFINED = Atom("undefined")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A load that might be.

    Attributes:
        path: of the model's files; None where they are not here, and ``card`` has to do.
    """

    model: str
    path: Path | None
    card: Card | None
    options: LoadOptions
    defaults: Defaults
    host: Host


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
    placement = decide(request, (question.host,), spec, stored, kind)
    return {
        Atom("model"): question.model,
        Atom("state"): Atom("remote" if stored is None else "local"),
        Atom("size_bytes"): size_bytes,
        Atom("assumed"): kind,  # storage format; empty where it was read
        **placement_term(placement, question.host),
    }


def placement_term(placement: Placement, host: Host) -> dict[Any, Term]:
    """A decision as a map; ``chosen`` is ``undefined`` where nothing fits, and ``why`` says why."""
    request, chosen = placement.request, placement.chosen
    return {
        Atom("context_tokens"): request.context_tokens,
        Atom("slots"): request.num_slots,
        Atom("node"): Atom(host.name),
        Atom("limit_bytes"): host.limit_bytes,
        Atom("used_bytes"): host.used_bytes,
        Atom("chosen"): _candidate(chosen, placement.engine) if chosen else _UNDEFINED,
        Atom("rejected"): [_candidate(one, placement.engine) for one in placement.rejected],
        Atom("why"): str(placement.refusal) if placement.refusal else "",
    }


def _candidate(candidate: Candidate, engine: str) -> dict[Any, Term]:
    return {
        **describe_shape(candidate.shape, engine),
        Atom("total_bytes"): candidate.total_bytes,
        Atom("ranks"): [_rank(number, rank) for number, rank in enumerate(candidate.ranks)],
        Atom("why"): candidate.why,
    }


def _rank(number: int, rank: RankPlace) -> dict[Any, Term]:
    shard, needs = rank.shard, rank.needs
    ranges = {
        "layers": shard.layers,
        "kv_heads": shard.kv_heads,
        "query_heads": shard.query_heads,
        "ffn": shard.ffn,
        "vocab": shard.vocab,
        "experts": shard.experts,
    }
    return {
        Atom("rank"): number,
        Atom("node"): Atom(rank.node),
        Atom("device"): rank.device,
        Atom("kernels"): Atom(rank.kernels),
        Atom("threads"): rank.threads,
        **{Atom(name): [part.start, part.stop] for name, part in ranges.items()},
        Atom("weights_bytes"): needs.weights_bytes,
        Atom("kv_bytes"): needs.kv_bytes,
        Atom("workspace_bytes"): needs.workspace_bytes,
        Atom("process_bytes"): needs.process_bytes,
        Atom("total_bytes"): needs.total_bytes,
        Atom("limit_bytes"): rank.limit_bytes,
    }
