"""Any process of the tree may be killed: the tree comes back, and the node answers again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from tests.cluster.live_node import LiveNode
from tests.cluster.test_end_to_end import Stream, ask
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

# A node at a time is killed less often than its restart budgets allow: 5 in 30 s.
VICTIMS = (
    ("events", "cluster_sup", "scheduler", "gateway"),
    ("model_store", "ports", "membership", "cluster"),
    ("instance_sup", "surface_sup", "election"),
)


def pid_of(tree: Term, name: str) -> Pid | None:
    """Pid of the child ``name`` anywhere in the answer of ``tree``."""
    if tree.get("id") == name or tree.get("name") == name:
        pid = tree.get("pid")
        return pid if isinstance(pid, Pid) else None
    return next((p for c in tree.get("children", []) if (p := pid_of(c, name))), None)


Body = Callable[[Process, str], Awaitable[Term]]


def on_node(node: LiveNode, body: Body) -> Term:
    """Run ``body(me, name)`` in a process of a hidden node that is connected to ``node``."""

    async def main() -> Term:
        peer = Node("tester@127.0.0.1", node.cookie, hidden=True)
        await peer.start(listen=None, epmd=Epmd(tcp_port=node.epmd_port, bring=False))
        try:
            assert await peer.connect(node.name, timeout_s=5)
            with peer.open_process() as me:
                return await body(me, node.name)
        finally:
            await peer.stop()

    return asyncio.run(main())


async def kill(me: Process, node: str, name: str) -> Pid:
    tree = await gen_server.call(me, ("root_sup", node), Atom("tree"))
    pid = pid_of(tree, name)
    assert pid is not None, name
    monitor = me.monitor(pid)
    me.exit(pid, Atom("kill"))
    reason = await me.receive(lambda m: m[4] if m[:2] == ("DOWN", monitor) else None, timeout_s=5)
    assert reason == "killed"
    return pid


def answers(node: LiveNode) -> bool:
    try:
        return "Paris" in ask(node)
    except Exception:  # noqa: BLE001 - while the tree restarts, every kind of refusal is fine
        return False


@pytest.mark.parametrize("victims", VICTIMS)
def test_every_process_of_the_tree_may_be_killed(
    make_node: Callable[..., LiveNode], victims: tuple[str, ...]
) -> None:
    node = make_node()
    for name in victims:
        old = on_node(node, partial(kill, name=name))
        wait_until(lambda: answers(node), 30, f"an answer after {name} was killed")

        async def find(me: Process, to: str, name: str = name) -> Pid | None:
            return pid_of(await gen_server.call(me, ("root_sup", to), Atom("tree")), name)

        def is_another(find: Body = find, old: Term = old) -> bool:
            return on_node(node, find) not in (None, old)

        wait_until(is_another, 30, f"another {name}")  # the old one's children may answer first
        wait_until(lambda: len(node.status()["instances"]) == 1, 10)
    assert node.stop() == 0
    assert not node.port_pids()


def test_the_brain_may_be_killed_without_a_stream_noticing(
    make_node: Callable[..., LiveNode],
) -> None:
    node = make_node()
    undisturbed = Stream(node, max_tokens=120).result()
    stream = Stream(node, max_tokens=120)
    wait_until(lambda: len(stream.pieces) > 5, 30)
    for name in ("scheduler", "election", "membership", "cluster"):
        on_node(node, partial(kill, name=name))
    assert stream.result() == undisturbed
    assert node.instance()["epoch"] == 1
