"""A port measures its device with the engine that would run there, in about a second."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bridge import gen_server
from bridge.node import Node
from bridge.term import Atom, Pid
from compute.port_server import PortServer


@pytest.mark.slow
@pytest.mark.timeout(300)  # compiles on a fresh machine
def test_a_port_measures_a_device_and_refuses_one_that_is_none() -> None:
    async def run() -> None:
        node = Node("port@127.0.0.1", "c")
        port = await gen_server.start(node, PortServer("p", end=lambda status: None))
        assert isinstance(port, Pid)

        async def measured(device: str) -> Any:
            request = (Atom("measure"), device, 1)
            return await gen_server.node_call(node, port, request, timeout_s=200.0)

        ok, weights_per_s, flops_per_s = await measured("cpu:0")
        assert ok == "ok"
        assert 1e8 < weights_per_s < 1e13
        assert 2 * weights_per_s < flops_per_s < 1e15  # many positions share a reading of weights
        refused = await measured("tpu:0")
        assert isinstance(refused, tuple)
        assert refused[:2] == ("error", "not_measured")
        assert "unknown device 'tpu:0'" in str(refused[2])
        await node.stop()

    asyncio.run(run())
