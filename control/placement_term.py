"""A placement decision as the map that ``ctl place`` and ``POST /cluster/place`` answer."""

from __future__ import annotations

from typing import Any

from bridge.term import Atom, Term
from control.cost_model import Estimate, Goal
from control.fleet import Fleet
from control.instance_spec import describe_shape
from control.placement_types import Candidate, Placement, RankPlace
from control.planner import Option
from control.seats import Member, Speeds

_UNDEFINED = Atom("undefined")


def placement_term(placement: Placement, fleet: Fleet) -> dict[Any, Term]:
    """``chosen`` is ``undefined`` where nothing fits, and ``why`` says why.

    Where one machine computes, ``node`` and its memory stand at the top; ``estimate`` of an
    option, ``goal`` and ``fenced`` are there where several machines were planned over.
    """
    request, chosen, plan = placement.request, placement.chosen, placement.plan
    found: dict[Any, Term] = {
        Atom("context_tokens"): request.context_tokens,
        Atom("slots"): request.num_slots,
        Atom("machines"): [_machine(member, fleet.speeds) for member in fleet.members],
        Atom("chosen"): _candidate(chosen, placement.engine) if chosen else _UNDEFINED,
        Atom("rejected"): [_candidate(one, placement.engine) for one in placement.rejected],
        Atom("why"): str(placement.refusal) if placement.refusal else "",
    }
    if len(fleet.computing) == 1:
        host = fleet.computing[0].host
        found[Atom("node")] = Atom(host.name)
        found[Atom("limit_bytes")] = host.limit_bytes
        found[Atom("used_bytes")] = host.used_bytes
    if plan is None:
        return found
    found[Atom("goal")] = Atom(plan.goal.value)
    found[Atom("considered")] = plan.num_considered
    found[Atom("fenced")] = [
        {Atom("node"): Atom(one.node), Atom("why"): one.why} for one in plan.fenced
    ]
    rejected = [_option(option, plan.goal) for option in plan.others]
    if plan.chosen is not None:
        found[Atom("chosen")] = _option(plan.chosen, plan.goal)
        found[Atom("rejected")] = rejected
    else:  # all ranks went to one machine, for want of devices
        found[Atom("rejected")] = [*found[Atom("rejected")], *rejected] if chosen else rejected
    return found


def _machine(member: Member, speeds: Speeds) -> dict[Any, Term]:
    host = member.host
    own = sorted((device, speed) for (node, device), speed in speeds.items() if node == host.name)
    return {
        Atom("node"): Atom(host.name),
        Atom("roles"): [Atom(role) for role in sorted(member.roles)],
        Atom("cores"): host.cores,
        Atom("limit_bytes"): host.limit_bytes,
        Atom("used_bytes"): host.used_bytes,
        Atom("cuda_free_bytes"): list(host.cuda_free_bytes),
        Atom("has_files"): member.has_files,
        Atom("speeds"): [
            {
                Atom("device"): device,
                Atom("weights_per_s"): speed.weights_per_s,
                Atom("flops_per_s"): speed.flops_per_s,
            }
            for device, speed in own
        ],
    }


def _option(option: Option, goal: Goal) -> dict[Any, Term]:
    found = _candidate(option.candidate, option.engine)
    if option.estimate is not None:
        found[Atom("estimate")] = _estimate(option.estimate, goal)
    return found


def _estimate(one: Estimate, goal: Goal) -> dict[Any, Term]:
    """Seconds; ``tokens_per_s`` of all that ``goal`` has running at once."""
    return {
        Atom("goal"): Atom(goal.value),
        Atom("token_s"): one.token_s,
        Atom("tokens_per_s"): one.tokens_per_s,
        Atom("request_s"): one.request_s,
        Atom("start_s"): one.start_s,
        Atom("fetch_s"): one.fetch_s,
        Atom("compute_s"): one.compute_s,
        Atom("sums_s"): one.sums_s,
        Atom("hops_s"): one.hops_s,
        Atom("head_s"): one.head_s,
    }


def _candidate(candidate: Candidate, engine: str) -> dict[Any, Term]:
    shares = candidate.shape.shares
    return {
        **describe_shape(candidate.shape, engine),
        Atom("total_bytes"): candidate.total_bytes,
        Atom("ranks"): [
            _rank(number, rank, shares[number] / sum(shares))
            for number, rank in enumerate(candidate.ranks)
        ],
        Atom("why"): candidate.why,
    }


def _rank(number: int, rank: RankPlace, share: float) -> dict[Any, Term]:
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
        Atom("share"): share,
        **{Atom(name): [part.start, part.stop] for name, part in ranges.items()},
        Atom("weights_bytes"): needs.weights_bytes,
        Atom("kv_bytes"): needs.kv_bytes,
        Atom("workspace_bytes"): needs.workspace_bytes,
        Atom("process_bytes"): needs.process_bytes,
        Atom("total_bytes"): needs.total_bytes,
        Atom("limit_bytes"): rank.limit_bytes,
    }
