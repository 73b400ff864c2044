"""How the ranks of an instance come to hold it: who is here, one group id, one order each.

A *group* is one generation of ranks that know each other. Its id is a secret of theirs: with it
a rank is met, so it is in no log, no state that can be looked at, and no error.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bridge import gen_server
from bridge.process import Process
from bridge.process_errors import Exit
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.instance_spec import InstanceSpec

PREPARE_S = 30.0
LOAD_S = 1800.0  # a 100 GB model from a slow disk
LOOPBACK = "127.0.0.1"
# Refusals that say nothing of the model: a rank was lost meanwhile, or still holds another load.
_START_ANEW = frozenset({"busy", "peer_lost", "join_refused"})


class LoadFailed(Exception):
    """A rank refused its order; the text is for the operator."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


@dataclass(frozen=True, slots=True)
class Prepared:
    """A port's answer to ``prepare``.

    Attributes:
        holds: group in which it has loaded already, or empty.
        place: where its peers will meet it; opaque.
    """

    holds: str
    place: Term


def choose_group(held: Sequence[str]) -> str | None:
    """Id of the group to load in: the one that all hold, a new one if none holds any.

    None where some hold one and others not, or not the same: nothing can be made of that.
    """
    if not any(held):
        return secrets.token_hex(16)
    return held[0] if len(set(held)) == 1 else None


async def load_ranks(
    me: Process, spec: InstanceSpec, epoch: int, ports: Sequence[Pid]
) -> list[dict[Any, Term]]:
    """Load ``spec`` on ``ports``, in rank order; what each rank says of itself.

    Raises:
        LoadFailed: the first refusal of any rank. The others are not waited for: they sit in
            a join that cannot come about.
        Exit: a port was lost, or the ports belong to different generations. The group has to
            start anew.
    """
    hosts = met_at(spec)
    prepares: list[Term] = [(Atom("prepare"), host) for host in hosts]
    prepared = [_prepared(answer) for answer in await _ask_all(me, ports, prepares)]
    held = [one.holds for one in prepared]
    group = choose_group(held)
    if group is None:
        raise Exit((Atom("mixed_ranks"), "some ranks hold weights of a generation others lost"))
    places = [one.place for one in prepared]
    orders = [
        (Atom("load"), _order(spec, epoch, rank, group, places, hosts))
        for rank in range(spec.num_ranks)
    ]
    facts: list[dict[Any, Term]] = []
    for answer in await _ask_all(me, ports, orders, timeout_s=LOAD_S):
        match answer:
            case ("ok", dict(found)):
                facts.append(found)
            case ("error", kind, text) if any(held) or str(kind) in _START_ANEW:
                raise Exit((Atom("load_interrupted"), text_of(text)))
            case ("error", kind, text):
                raise LoadFailed(str(kind), text_of(text))
            case _:
                raise LoadFailed("bad_answer", "a rank answered its order with something else")
    return facts


def met_at(spec: InstanceSpec) -> list[str]:
    """For each rank the host where the others meet it.

    It is also the name of its machine: ranks with the same one share memory.
    """
    nodes = [rank.node for rank in spec.ranks]
    if len(set(nodes)) == 1:
        return [LOOPBACK] * len(nodes)
    hosts = dict(spec.addresses)
    return [hosts[node] for node in nodes]


async def _ask_all(
    me: Process, ports: Sequence[Pid], requests: Sequence[Term], *, timeout_s: float = PREPARE_S
) -> list[Term]:
    """All answers in order, or at once those with an error among them, which comes last."""

    async def ask(port: Pid, request: Term) -> Term:
        try:
            return await gen_server.node_call(me.node, port, request, timeout_s=timeout_s)
        except gen_server.CallError as exc:
            # A new reason: that of the error quotes the request, and with it the group's id.
            raise Exit((Atom("port_lost"), str(exc))) from None

    tasks = [
        asyncio.ensure_future(ask(port, request))
        for port, request in zip(ports, requests, strict=True)
    ]
    try:
        for first in asyncio.as_completed(tasks):
            answer = await first
            if not (isinstance(answer, tuple) and answer and answer[0] == "ok"):
                return [answer]
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _prepared(answer: Term) -> Prepared:
    match answer:
        case ("ok", {"holds": holds, "place": place}):
            return Prepared(text_of(holds), place)
        case ("error", kind, text):
            raise LoadFailed(str(kind), text_of(text))
        case _:
            raise LoadFailed("bad_answer", "a port does not know how to prepare a load")


def _order(
    spec: InstanceSpec, epoch: int, rank: int, group: str, places: list[Term], hosts: list[str]
) -> dict[Any, Term]:
    mine, shape = spec.ranks[rank], spec.shape
    return {
        Atom("instance"): spec.id,
        Atom("epoch"): epoch,
        Atom("group"): group,
        Atom("rank"): rank,
        Atom("tensor"): shape.tensor,
        Atom("pipeline"): shape.pipeline,
        Atom("shares"): list(shape.shares),
        Atom("experts"): spec.experts,
        Atom("hosts"): hosts,
        Atom("places"): places,
        Atom("devices"): [r.device for r in spec.ranks] if _differ(spec) else [],
        Atom("path"): mine.path.as_posix(),
        Atom("context_tokens"): spec.context_tokens,
        Atom("num_slots"): spec.num_slots,
        Atom("threads"): mine.threads,
        Atom("device"): mine.device,
        Atom("limit_bytes"): mine.limit_bytes,
    }


def _differ(spec: InstanceSpec) -> bool:
    return len({rank.device for rank in spec.ranks}) > 1
