"""What takes long on the way of an instance into being: a process of its own for each.

Files are found or fetched, its place is chosen, every machine gets what its ranks need, and the
head's machine starts the group. Results go to the scheduler's books as ``{worker, Pid, Message}``,
so that word of one that was ended meanwhile counts for nothing:

============================================  ================================================
``{fetching, Id}``                            files come from outside: it takes its time
call ``{place_turn, Id}``                     ``{ok, Used, Tenants, Avoid}``: nobody else places
                                              until it says ``placed``, ``failed``, ``make_room``
                                              or ends; ``Avoid``: machines with the same model
``{placed, Id, Taken}``                       bytes that it will take, by node and pool
``{prepared, Id, Spec}``                      every machine has its files
``{started, Id, Group}``                      its processes are there
``{failed, Id, Kind, Text}``                  it came to nothing
``{make_room, Id, Ids}``                      it would fit without these
============================================  ================================================
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control import model_files
from control.choose import choose
from control.errors import ControlError
from control.fleet import Fleet, read_fleet
from control.instance_spec import InstanceSpec, RankSpec, spec_term
from control.load_options import LoadOptions
from control.model_files import Located
from control.moves import Tenant, fewest, victims
from control.names import wait_for_names
from control.placement_request import Defaults, Request
from control.placement_types import Candidate, Placement, RankPlace
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import ModelError
from models.needed import merged, needed_ranges

START_S: Final = 150.0
ASK_S: Final = 5.0
TURN_S: Final = 600.0
KEEP_WHOLE_BYTES: Final = 8 * 10**9  # up to here machines with the storage role keep all of it
Used = Mapping[tuple[str, str], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One instance to bring up: what was asked, and defaults for the rest.

    Attributes:
        first_epoch: epochs that it has had.
    """

    id: str
    model: str
    options: LoadOptions
    defaults: Defaults
    wanted: bool = True
    first_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Files:
    """Where a model's files are.

    Attributes:
        sources: machines with all of them, best first.
        located: what each machine has.
    """

    sources: list[str]
    located: dict[str, Located]

    def path(self, node: str) -> Path | None:
        """On a machine that has all of them."""
        return self.located[node].path if node in self.sources else None


def tell(me: Process, books: Pid, what: str, *rest: Term) -> None:
    """Word for the books, which look whether this is still who works on it."""
    me.send(books, (Atom("worker"), me.pid, (Atom(what), *rest)))


async def bring_up(me: Process, plan: Plan, books: Pid) -> None:
    """Fetch, choose, distribute, start; tells ``books``, see above."""

    def failed(kind: str, text: str) -> None:
        tell(me, books, "failed", plan.id, Atom(kind), text)

    await wait_for_names(me, ("model_store", "membership", "election"))
    try:
        fleet = await read_fleet(me)
        files = await _find_files(me, plan, fleet, books)
        header = await model_files.header(me.node, plan.model, files.located, files.sources)
        checkpoint = await asyncio.to_thread(open_checkpoint, header)
        turn: Term = (Atom("place_turn"), plan.id)
        _, used, tenants, avoid = await gen_server.call(me, books, turn, timeout_s=TURN_S)
        fleet = (await read_fleet(me)).with_used(used).with_files(files.sources)
        request = Request.of(plan.model, plan.options, checkpoint.spec, plan.defaults)
        placement = await asyncio.to_thread(_choose, plan, request, fleet, checkpoint, avoid)
        if placement.chosen is None:
            going = await _make_room(me, plan, request, fleet, checkpoint, used, tenants)
            if going:
                tell(me, books, "make_room", plan.id, going)
                return
            assert placement.refusal is not None
            raise placement.refusal
        tell(me, books, "placed", plan.id, _taken(placement.chosen))
        spec = await _distribute(me, plan, fleet, placement, checkpoint, files)
    except (ModelError, ControlError) as exc:
        failed(exc.kind, str(exc))
        return
    except gen_server.CallError as exc:
        failed("internal_error", str(exc))
        return
    tell(me, books, "prepared", plan.id, spec)
    await start(me, spec, books)


async def start(me: Process, spec: InstanceSpec, books: Pid) -> None:
    """Have the head's machine start the group, while this node may place."""

    def failed(kind: str, text: str) -> None:
        tell(me, books, "failed", spec.id, Atom(kind), text)

    try:
        right = await gen_server.call(me, Atom("election"), Atom("authority"), timeout_s=ASK_S)
        match right:
            case ("ok", int(epoch), _, _):
                order: Term = (Atom("start"), me.node.name, epoch, spec_term(spec))
            case ("error", kind, text):
                failed(str(kind), text_of(text))
                return
            case other:
                failed("internal_error", repr(other)[:300])
                return
        dest = (Atom("agent"), Atom(spec.head_node))
        answer = await gen_server.call(me, dest, order, timeout_s=START_S)
    except gen_server.CallError as exc:
        # An agent that ends, or has ended, is one of a machine that stops.
        gone = isinstance(exc, gen_server.NodeDown | gen_server.CallExit | gen_server.NoProc)
        kind = "machine_lost" if gone else "start_failed"
        failed(kind, f"{spec.head_node} did not start it: {exc}")
        return
    match answer:
        case ("ok", Pid() as group):
            tell(me, books, "started", spec.id, group)
        case ("error", kind, text):
            failed(str(kind), text_of(text))
        case other:
            failed("start_failed", repr(other)[:300])


def here(me: Process) -> str:
    """This machine."""
    return str(me.node.name)


async def _find_files(me: Process, plan: Plan, fleet: Fleet, books: Pid) -> Files:
    """Machines with the files; where there is none, one fetches them. Raises NoFiles."""
    located = await model_files.locate(me.node, plan.model, fleet.nodes)
    sources = model_files.best_sources(located, fleet.roles, here(me))
    if not sources:
        tell(me, books, "fetching", plan.id)
        fetcher = model_files.best_fetcher(fleet.roles, here(me))
        path = await model_files.fetch(me.node, fetcher, plan.model)
        located[fetcher] = Located(fetcher, path, True)
        sources = [fetcher]
    return Files(sources, located)


def _choose(
    plan: Plan,
    request: Request,
    fleet: Fleet,
    checkpoint: Checkpoint,
    avoid: Collection[str] = (),
) -> Placement:
    """Place it, replicas apart where that can be. Raises BadOption, ModelError.

    Args:
        avoid: taken only where there is no other way.
    """

    def on(machines: Fleet) -> Placement:
        return choose(request, machines, checkpoint.spec, checkpoint, goal=plan.options.goal)

    apart = fleet.without(avoid) if avoid else fleet
    if avoid and apart.computing:
        found = on(apart)
        if found.chosen is not None:
            return found
    return on(fleet)


async def _make_room(
    me: Process,
    plan: Plan,
    request: Request,
    fleet: Fleet,
    checkpoint: Checkpoint,
    used: Used,
    tenants: Sequence[Tenant],
) -> list[str]:
    """The fewest, least needed instances without which it would fit; empty where none will do."""
    known = await asyncio.gather(*(_idle(me, tenant) for tenant in tenants))

    def fits(going: Sequence[Tenant]) -> bool:
        free = dict(used)
        for one in going:
            for pool, size in one.bytes.items():
                free[pool] = max(0, free.get(pool, 0) - size)
        return _choose(plan, request, fleet.with_used(free), checkpoint).chosen is not None

    may_go = victims(list(known), wanted=plan.wanted, priority=plan.options.priority)
    return [one.id for one in await asyncio.to_thread(fewest, may_go, fits)]


async def _idle(me: Process, tenant: Tenant) -> Tenant:
    """With what its coordinator says of its requests."""
    try:
        dest = (Atom(tenant.id), Atom(tenant.node))
        idle_s = await gen_server.node_call(me.node, dest, Atom("idle"), timeout_s=ASK_S)
    except gen_server.CallError:  # it is not serving
        return tenant
    return tenant.with_idle(float(idle_s))


async def _distribute(
    me: Process,
    plan: Plan,
    fleet: Fleet,
    placement: Placement,
    checkpoint: Checkpoint,
    files: Files,
) -> InstanceSpec:
    """Every machine gets what its ranks need; then what to run. Raises NoFiles."""
    chosen = placement.chosen
    assert chosen is not None
    nodes = {rank.node for rank in chosen.ranks}
    roles = fleet.roles

    async def bring(name: str) -> Path:
        if (path := files.path(name)) is not None:
            return path
        part: Term = Atom("whole")
        keeps = "storage" in roles.get(name, ()) and checkpoint.size_bytes <= KEEP_WHOLE_BYTES
        if not keeps:
            mine = [rank for rank in chosen.ranks if rank.node == name]
            part = await asyncio.to_thread(_part, checkpoint, mine)
        return await model_files.bring(me.node, name, plan.model, files.sources, part)

    names = sorted(nodes)
    paths = dict(zip(names, await asyncio.gather(*(bring(name) for name in names)), strict=True))
    request = placement.request
    return InstanceSpec(
        id=plan.id,
        model=plan.model,
        context_tokens=request.context_tokens,
        num_slots=request.num_slots,
        shape=chosen.shape,
        ranks=tuple(
            RankSpec(
                node=rank.node,
                path=paths[rank.node],
                device=rank.told,
                pool=rank.pool,
                threads=rank.threads,
                memory_bytes=rank.needs.total_bytes,
                limit_bytes=rank.limit_bytes,
            )
            for rank in chosen.ranks
        ),
        experts=request.experts or "inside",
        engine=placement.engine,
        first_epoch=plan.first_epoch,
        addresses=fleet.addresses_of(nodes),
    )


def _taken(chosen: Candidate) -> dict[tuple[str, str], int]:
    taken: Counter[tuple[str, str]] = Counter()
    for rank in chosen.ranks:
        taken[rank.node, rank.pool] += rank.needs.total_bytes
    return dict(taken)


def _part(checkpoint: Checkpoint, ranks: Sequence[RankPlace]) -> Term:
    """Byte ranges of the checkpoint's files that these ranks read, all together."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for rank in ranks:
        for name, parts in needed_ranges(checkpoint, rank.shard).items():
            ranges.setdefault(name, []).extend(parts)
    return (
        Atom("ranges"),
        {name: list(merged(parts)) for name, parts in ranges.items()},
    )
