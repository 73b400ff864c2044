"""A constrained answer over the death of its rank: the tokens of an undisturbed run, in form."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable

import jsonschema
import pytest

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.term import Atom, Term
from control.backend import DoneEvent, GenerateRequest, TokenEvent
from control.generation import GenerationLimits, generate
from control.journal import Journal
from models.checkpoint import open_checkpoint
from models.constraint import Constraint, check
from tests.cluster.conftest import MODEL
from tests.cluster.live_node import LiveNode
from tests.models.default_model import default_model_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SCHEMA = {
    "type": "object",
    "properties": {
        "lines": {"type": "array", "items": {"type": "string", "maxLength": 24}, "minItems": 6}
    },
    "required": ["lines"],
    "additionalProperties": False,
}


class Asking(GenServer):
    """Stands for the scheduler of a machine that runs nothing: asks the one that does."""

    def __init__(self, far: Atom) -> None:
        super().__init__()
        self._far = far

    async def handle_call(self, request: Term, from_: Term) -> Term:
        return await gen_server.call(
            self.me, (Atom("scheduler"), self._far), request, timeout_s=60.0
        )


def test_a_killed_rank_changes_no_token_of_a_constrained_answer(
    make_node: Callable[..., LiveNode],
) -> None:
    tokenizer = open_checkpoint(default_model_path()).tokenizer()
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    check(constraint)
    text = "<|im_start|>user\nWrite a poem in JSON.<|im_end|>\n<|im_start|>assistant\n"
    request = GenerateRequest(
        model=MODEL,
        prompt_ids=tuple(tokenizer.encode(text)),
        max_tokens=100,
        temperature=1.0,
        seed=11,
        stop_ids=tokenizer.eos_ids,
        constraint=constraint,
    )
    limits = GenerationLimits(route_s=60.0, token_s=60.0)

    async def ask(node: Node, kill_at: int | None) -> tuple[list[int], DoneEvent]:
        ids: list[int] = []
        async for event in generate(node, Journal(), request, limits=limits):
            if isinstance(event, DoneEvent):
                return ids, event
            assert isinstance(event, TokenEvent)
            ids.append(event.token_id)
            if len(ids) == kill_at:
                os.kill(await asyncio.to_thread(live.rank_pid), signal.SIGKILL)
        raise AssertionError("no end")

    async def scenario() -> None:
        node = Node("asker@127.0.0.1", live.cookie, hidden=True)
        await node.start(listen=("127.0.0.1", 0), epmd=Epmd(tcp_port=live.epmd_port, bring=False))
        try:
            await gen_server.start(node, Asking(Atom(live.name)), name="scheduler")
            whole = await ask(node, None)
            assert whole[1] in (DoneEvent("stop"), DoneEvent("length"))
            if whole[1].reason == "stop":
                jsonschema.validate(json.loads(tokenizer.decode(whole[0])), SCHEMA)
            assert len(whole[0]) > 24
            assert await ask(node, 20) == whole
        finally:
            await node.stop()
        assert live.instance()["restarts"] == 1

    live = make_node()
    asyncio.run(scenario())
