"""One generation from start to end, across as many epochs of an instance as it takes.

The loop: find who serves the model, submit prompt plus tokens so far, pass tokens on;
when the server is lost, find the next one. A token of an older submission carries an
older reference and is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from bridge import gen_server
from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control.backend import DoneEvent, GenerateRequest, TokenEvent
from control.errors import NotReady, UnknownModel
from control.find_server import find_server
from control.journal import Entry, Journal, LostToken

log = logging.getLogger("control.generation")

SUBMIT_S = 10.0
RETRY_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationLimits:
    """How long a generation waits before it ends as an error.

    Attributes:
        route_s: for an instance that serves the model (loading, recovering).
        token_s: for the next token of a live instance.
    """

    route_s: float = 600.0
    token_s: float = 600.0


@dataclass(slots=True)
class _Lost:
    """The server of this submission is gone."""

    why: str


async def generate(
    node: Node,
    journal: Journal,
    request: GenerateRequest,
    *,
    limits: GenerationLimits,
    on_recovery: Callable[[float], None] = lambda pause_s: None,
) -> AsyncGenerator[TokenEvent | DoneEvent, None]:
    """Stream one generation; closing the iterator cancels it at the rank.

    Args:
        on_recovery: told the pause in seconds between the loss of a server and the first
            token of the next one.
    """
    entry_id, entry = journal.open(request)
    lost_at_s: float | None = None
    try:
        while True:
            if not entry.begin_attempt():
                lost = entry.attempts_without_token
                text = f"{lost} servers were lost in a row while they ran this request"
                yield DoneEvent("error", text)
                return
            # A process an attempt: with its end the rank hears that nobody waits any more.
            with node.open_process(label=f"request {request.request_id}") as me:
                async with aclosing(_attempt(me, entry, limits)) as events:
                    async for event in events:
                        match event:
                            case TokenEvent():
                                if lost_at_s is not None:
                                    on_recovery(time.monotonic() - lost_at_s)
                                    lost_at_s = None
                                yield event
                            case DoneEvent():
                                yield event
                                return
                            case _Lost(why):
                                log.warning("%s: %s; going on elsewhere", request.request_id, why)
                                lost_at_s = lost_at_s or time.monotonic()
                                if time.monotonic() - lost_at_s > limits.route_s:
                                    text = f"no token for {limits.route_s:.0f} s; at last: {why}"
                                    yield DoneEvent("error", text)
                                    return
            await asyncio.sleep(RETRY_S)
    finally:
        journal.close(entry_id)


async def _attempt(
    me: Process, entry: Entry, limits: GenerationLimits
) -> AsyncGenerator[TokenEvent | DoneEvent | _Lost, None]:
    """One submission. Ends with a DoneEvent or a _Lost."""
    if len(entry.tokens) >= entry.request.max_tokens:
        yield DoneEvent("length")  # the server died between its last token and its last word
        return
    try:
        instance, coordinator = await find_server(me, entry.request.model, timeout_s=limits.route_s)
    except (NotReady, UnknownModel) as exc:
        yield DoneEvent("error", str(exc))
        return
    monitors = {me.monitor(coordinator)}
    ref = me.make_ref()
    port, refused = await _submit(me, coordinator, ref, entry)
    if port is None:
        yield _Lost(refused)
        return
    if coordinator.node != me.node.name:
        monitors.add(me.monitor(port))  # tokens come over a link of their own
    first = True
    try:
        while True:
            match await me.receive(_of(ref, monitors), timeout_s=limits.token_s):
                case ("admitted", _):
                    entry.suspect()
                case ("token", _, int(index), int(token_id), logprob, list(top)):
                    event = TokenEvent(index, token_id, _number(logprob), tuple(map(_pair, top)))
                    if entry.accept(event):
                        if first:
                            gen_server.cast(me, coordinator, (Atom("progress"), ref))
                            first = False
                        yield event
                case ("done", _, reason, text, *_):
                    yield DoneEvent(_reason(str(reason)), text_of(text))
                    return
                case ("DOWN", _, _, _, reason):
                    yield _Lost(show(reason))
                    return
    except ReceiveTimeout:
        yield DoneEvent("error", f"no token for {limits.token_s:.0f} s from instance {instance}")
    except LostToken as exc:
        yield _Lost(str(exc))


async def _submit(me: Process, coordinator: Pid, ref: Ref, entry: Entry) -> tuple[Pid | None, str]:
    """Hand the request over; the port that runs it, or why that did not work."""
    submit = (Atom("submit"), ref, _options(entry))
    try:
        answer = await gen_server.call(me, coordinator, submit, timeout_s=SUBMIT_S)
    except gen_server.CallError as exc:
        return None, str(exc)
    match answer:
        case ("ok", _, Pid() as port):
            return port, ""
        case _:
            return None, show(answer)


def _of(ref: Ref, monitors: set[Ref]) -> Callable[[Term], Term | None]:
    """Match what belongs to this submission."""

    def match(message: Term) -> Term | None:
        match message:
            case ("admitted" | "token" | "done", found, *_) if found == ref:
                return message
            case ("DOWN", found, _, _, _) if found in monitors:
                return message
            case ("admitted" | "token" | "done", *_):
                return ("stale",)  # an older submission of ours: taken out and dropped
            case _:
                return None

    return match


def _options(entry: Entry) -> dict[Any, Term]:
    r = entry.request
    options: dict[Any, Term] = {
        Atom("request_id"): r.request_id,
        Atom("prompt"): list(r.prompt_ids),
        Atom("generated"): list(entry.tokens),
        Atom("max_tokens"): r.max_tokens,
        Atom("temperature"): float(r.temperature),
        Atom("top_p"): float(r.top_p),
        Atom("top_k"): r.top_k,
        Atom("min_p"): float(r.min_p),
        Atom("presence_penalty"): float(r.presence_penalty),
        Atom("frequency_penalty"): float(r.frequency_penalty),
        Atom("logit_bias"): [(k, float(v)) for k, v in sorted(r.logit_bias.items())],
        Atom("seed"): r.seed,
        Atom("stop_ids"): sorted(r.stop_ids),
        Atom("logprobs"): -1 if r.logprobs is None else r.logprobs,
    }
    if r.constraint is not None:
        options[Atom("grammar")] = {
            Atom("kind"): Atom(r.constraint.kind),
            Atom("text"): r.constraint.text,
            Atom("before"): r.constraint.before,
        }
    return options


def _number(value: Term) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _pair(value: Term) -> tuple[int, float]:
    token_id, logprob = value
    return int(token_id), float(logprob)


def _reason(text: str) -> Any:
    return text if text in ("stop", "length", "cancelled", "error") else "error"
