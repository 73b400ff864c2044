"""What the leader asks of agents, each in a process of its own; answers go to its books.

================================================  ============================================
``{stopped, Id}``                                 nothing of the instance is left
``{group_down, Id, #{...} | undefined, Reason}``  what its agent knows of a group's end
``{stock, Epoch, [Running], [Node]}``             what runs on the machines that answered
``{joined, Node, [Running]}``                     what runs on a machine that has come
``{lost, Node}``                                  a machine is not just starting again
================================================  ============================================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Final

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.membership_rule import ENDED
from control.reconcile import Running, running_of

log = logging.getLogger("control.scheduler")

ASK_S: Final = 5.0
RUNNING_S: Final = 30.0  # a group that comes up may keep its agent waiting
STOCK_S: Final = 10.0  # a machine that has not answered then is taken up when it does
AGAIN_S: Final = 0.25
END_S: Final = 60.0
UNSURE_S: Final = 20.0  # that a stop waits for a leader which is unsure for a while
GRACE_S: Final = 4.0  # in which a control process that was killed is back


async def stop_group(
    me: Process, node: str, id_: str, drain_s: float, *, only: Pid | None = None
) -> None:
    """Drain and end a group where ``node`` obeys; what cannot be reached is taken up later.

    Args:
        only: the group that is meant, where another may have its place by then.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + UNSURE_S
    with contextlib.suppress(gen_server.CallError):
        while True:
            right = await gen_server.call(me, Atom("election"), Atom("authority"), timeout_s=ASK_S)
            if right[0] == "ok":
                break
            if loop.time() > deadline_s:
                log.warning("%s goes on at %s: this node may not stop it", id_, node)
                return
            await asyncio.sleep(AGAIN_S)
        which = () if only is None else (only,)
        stop: Term = (Atom("stop"), me.node.name, right[1], id_, float(drain_s), *which)
        dest = (Atom("agent"), Atom(node))
        answer = await gen_server.call(me, dest, stop, timeout_s=drain_s + END_S)
        if answer != "ok":
            log.warning("%s does not stop %s: %s", node, id_, answer)


async def take_down(me: Process, id_: str, node: str, drain_s: float, books: Pid) -> None:
    """Unload an instance whose group is on ``node``, if it has one."""
    if node:
        await stop_group(me, node, id_, drain_s)
    me.send(books, (Atom("stopped"), id_))


async def find_out(me: Process, id_: str, node: str, reason: Term, books: Pid) -> None:
    """Why a group ended. Where its machine goes, membership says what becomes of it."""
    known: Term = Atom("undefined")
    asked: Term = (Atom("why"), id_)
    while known == "undefined" and await is_up(me, node):
        try:
            dest = (Atom("agent"), Atom(node))
            answer = await gen_server.node_call(me.node, dest, asked, timeout_s=RUNNING_S)
            known = answer[1]
        except gen_server.CallError:  # it is being restarted
            await asyncio.sleep(AGAIN_S)
    me.send(books, (Atom("group_down"), id_, known, reason))


async def what_runs(
    me: Process, node: str, *, timeout_s: float = RUNNING_S
) -> list[Running] | None:
    """What an agent says; None where it does not."""
    try:
        answer = await gen_server.node_call(
            me.node, (Atom("agent"), Atom(node)), Atom("running"), timeout_s=timeout_s
        )
        return running_of(node, answer)
    except (gen_server.CallError, ValueError) as exc:
        log.info("what runs on %s is not known yet: %s", node, exc)
        return None


async def take_stock(me: Process, epoch: int, nodes: Sequence[str], books: Pid) -> None:
    """Ask every machine that is up, those that do not answer again for a while; then tell."""
    found: list[Running] = []
    left = list(nodes)
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + STOCK_S
    while left and loop.time() < deadline_s:
        wait_s = deadline_s - loop.time()
        asked = (what_runs(me, node, timeout_s=wait_s) for node in left)
        answers = await asyncio.gather(*asked)
        for rows in answers:
            found.extend(rows or ())
        left = [node for node, rows in zip(left, answers, strict=True) if rows is None]
        if left:
            await asyncio.sleep(AGAIN_S)
    answered: list[Term] = [Atom(node) for node in nodes if node not in left]
    me.send(books, (Atom("stock"), epoch, found, answered))


async def welcome(me: Process, node: str, books: Pid) -> None:
    """Ask a machine that has come what it runs, until it answers or is gone again."""
    while (rows := await what_runs(me, node)) is None:
        if not await is_up(me, node):
            return
        await asyncio.sleep(AGAIN_S)
    me.send(books, (Atom("joined"), Atom(node), rows))


async def judge(me: Process, node: str, books: Pid) -> None:
    """Whether a machine that went down is gone, or only its control process starts again."""
    why = await _why_down(me, node)
    if why == ENDED:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + GRACE_S
        while loop.time() < deadline_s:
            await asyncio.sleep(AGAIN_S)
            if await is_up(me, node):
                return
    if not await is_up(me, node):
        me.send(books, (Atom("lost"), Atom(node)))


async def _why_down(me: Process, node: str) -> str:
    with contextlib.suppress(gen_server.CallError):
        rows = await gen_server.call(me, Atom("membership"), Atom("nodes"), timeout_s=ASK_S)
        for row in rows:
            if row["name"] == node:
                return text_of(row["why"])
    return ""


async def is_up(me: Process, node: str) -> bool:
    """Whether membership has it."""
    if node == me.node.name:
        return True
    with contextlib.suppress(gen_server.CallError):
        return node in await gen_server.call(me, Atom("membership"), Atom("up"), timeout_s=ASK_S)
    return False
