"""Who serves a model: the client side of the scheduler's ``find``, patient over its restarts."""

from __future__ import annotations

import asyncio

from bridge import gen_server
from bridge.process import Process
from bridge.term import Atom, Pid
from bridge.text import text_of
from control.errors import NotReady, UnknownModel


async def find_server(me: Process, model: str, *, timeout_s: float) -> tuple[str, Pid]:
    """The instance that serves ``model`` and its coordinator, waiting for one that is coming up.

    Raises:
        UnknownModel: nothing is known by this name.
        NotReady: nothing serves it, or not within ``timeout_s``.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while True:
        left_s = deadline_s - loop.time()
        if left_s <= 0:
            raise NotReady(model, f"no instance became ready within {timeout_s:.0f} s")
        try:
            answer = await gen_server.call(
                me, Atom("scheduler"), (Atom("find"), model), timeout_s=left_s
            )
        except gen_server.CallTimeout:
            continue
        except gen_server.CallError:  # it is being restarted
            await asyncio.sleep(min(0.05, left_s))
            continue
        match answer:
            case ("ok", instance, Pid() as pid):
                return text_of(instance), pid
            case ("error", "unknown_model", text):
                raise UnknownModel(model, told=text_of(text))
            case ("error", kind, text):
                raise NotReady(model, text_of(text), kind=str(kind))
