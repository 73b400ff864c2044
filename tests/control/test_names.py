"""Waiting for a name that its former owner has yet to give up."""

from __future__ import annotations

import asyncio

import pytest

from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import NameRegistered
from bridge.term import Atom
from control.names import until_free


def test_a_name_is_waited_for_until_its_owner_is_gone() -> None:
    async def main() -> None:
        node = Node("t@127.0.0.1", "c")

        async def last_act(me: Process) -> None:
            await me.receive()

        owner = node.spawn(last_act, name="taken")
        with node.open_process() as me:
            waiting = asyncio.ensure_future(until_free(me, "taken"))
            done, _ = await asyncio.wait({waiting}, timeout=0.05)
            assert not done
            me.send(owner, Atom("go"))
            await asyncio.wait_for(waiting, 5)
            node.spawn(last_act, name="taken")
            await until_free(me, "free")
            await until_free(me, "taken", timeout_s=0.01)
            with pytest.raises(NameRegistered):
                node.spawn(last_act, name="taken")
        await node.stop()

    asyncio.run(main())
