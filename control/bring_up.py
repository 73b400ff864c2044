"""What takes long in the life of an instance, each in a process of its own.

Fetch and check the files, start the group, drain and end it, and find out after a restart
of the scheduler what runs. Results go to the scheduler's books as messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.errors import ControlError
from control.instance import History, instance_child
from control.instance_spec import InstanceSpec, RankSpec
from control.load_options import LoadOptions
from control.placement import decide
from control.placement_request import Defaults, Host, Request
from control.placement_types import MEMORY
from control.rank import RankLimits
from control.reconcile import Running
from models.checkpoint import open_checkpoint
from models.errors import ModelError

TREE_UP_S = 60.0
POLL_S = 0.02
FETCH_S = 7 * 24 * 3600.0  # the store gives up on a stalled download itself
START_S = 120.0
END_S = 60.0
ASK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One instance to bring up: what was asked, defaults for the rest, and where."""

    id: str
    model: str
    ref: str
    options: LoadOptions
    defaults: Defaults
    host: Host


async def bring_up(
    me: Process, plan: Plan, *, history: History, limits: RankLimits, books: Pid
) -> None:
    """Fetch, check, start. Tells ``books``: ``prepared`` and ``started``, or ``failed``."""

    def failed(kind: str, text: str) -> None:
        me.send(books, (Atom("failed"), plan.id, Atom(kind), text))

    await wait_for_names(me, ("model_store", "ports", "instance_sup"))
    match await gen_server.call(
        me, Atom("model_store"), (Atom("ensure"), plan.ref), timeout_s=FETCH_S
    ):
        case ("ok", found):
            path = Path(text_of(found))
        case ("error", kind, text):
            failed(str(kind), text_of(text))
            return
        case other:
            failed("model_store", repr(other))
            return
    try:
        spec = await asyncio.to_thread(_decide, path, plan)
    except (ModelError, ControlError) as exc:
        failed(exc.kind, str(exc))
        return
    me.send(books, (Atom("prepared"), plan.id, spec))
    child = instance_child(spec, history, limits)
    match await gen_server.call(
        me, Atom("instance_sup"), (Atom("start_child"), child), timeout_s=START_S
    ):
        case ("ok", Pid() as group):
            me.send(books, (Atom("started"), plan.id, group))
        case other:
            failed("start_failed", f"its processes did not start: {show(other, 500)}")


def _decide(path: Path, plan: Plan) -> InstanceSpec:
    """Read the model's header and place it, before anything starts.

    Raises:
        ModelError: the file is damaged, of a kind that is not supported, or cannot be cut as
            asked for.
        BadOption: the model or the machine cannot do what was asked for.
        NoPlacement: a rank would take more memory than this machine lends.
    """
    checkpoint = open_checkpoint(path)
    request = Request.of(plan.model, plan.options, checkpoint.spec, plan.defaults)
    placement = decide(request, (plan.host,), checkpoint.spec, checkpoint)
    if placement.chosen is None:
        assert placement.refusal is not None
        raise placement.refusal
    return InstanceSpec(
        id=plan.id,
        model=plan.model,
        context_tokens=request.context_tokens,
        num_slots=request.num_slots,
        shape=placement.chosen.shape,
        ranks=tuple(
            RankSpec(
                node=rank.node,
                path=path,
                device=rank.told,
                pool=rank.pool,
                threads=rank.threads,
                memory_bytes=rank.needs.total_bytes if rank.pool == MEMORY else 0,
                limit_bytes=rank.limit_bytes,
            )
            for rank in placement.chosen.ranks
        ),
        experts=request.experts or "inside",
        engine=placement.engine,
    )


async def take_down(
    me: Process, instance: str, coordinator: Pid | None, drain_s: float, books: Pid
) -> None:
    """Let active requests finish for ``drain_s``, then end the group. Tells ``stopped``."""
    if coordinator is not None:
        # An error: it is gone, or its clients take longer than they are given.
        with contextlib.suppress(gen_server.CallError):
            await gen_server.call(me, coordinator, Atom("drain"), timeout_s=drain_s)
    # An error: instance_sup is ending, and its children with it.
    with contextlib.suppress(gen_server.CallError):
        await gen_server.call(
            me,
            Atom("instance_sup"),
            (Atom("terminate_child"), Atom(instance)),
            timeout_s=END_S,
        )
    me.send(books, (Atom("stopped"), instance))


async def running_instances(me: Process) -> list[Running]:
    """Each instance that runs, once the tree is up."""
    await wait_for_names(me, ("model_store", "ports", "instance_sup"))
    found: list[Running] = []
    for id_, group, _, _ in await _which_children(me):
        if not isinstance(group, Pid):
            continue
        await wait_for_names(me, (text_of(id_),), timeout_s=ASK_S)
        try:
            spec, history = await gen_server.call(me, id_, Atom("books"), timeout_s=ASK_S)
            found.append((spec, group, history))
        except gen_server.CallError:  # a group in trouble: ended here, started anew from desired
            await take_down(me, text_of(id_), None, 0.0, me.pid)
    return found


async def is_supervisor_up(me: Process) -> bool:
    """Whether ``instance_sup`` goes on; False when it is ending or has ended.

    An ending supervisor answers nothing until it is gone, so the call finds out either way.
    """
    try:
        await _which_children(me)
    except gen_server.CallError:
        return False
    return True


async def _which_children(me: Process) -> list[tuple[Any, Term, Term, Term]]:
    answer = await gen_server.call(
        me, Atom("instance_sup"), Atom("which_children"), timeout_s=START_S
    )
    return list(answer)


async def wait_for_names(
    me: Process, names: Iterable[str], *, timeout_s: float = TREE_UP_S
) -> None:
    """Wait until all ``names`` are registered, or the time is over (the next call then says so)."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    # Names have no event; this runs at start-up only.
    while loop.time() < deadline_s and any(  # noqa: ASYNC110
        me.node.whereis(n) is None for n in names
    ):
        await asyncio.sleep(POLL_S)
