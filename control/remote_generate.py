"""``{generate, Model, Prompt, Options}`` for Erlang callers: text in, text or messages out.

A prompt of text is one user turn where the model has a chat template (as a chat would
send it), else plain text to continue; a list of ``#{role, content}`` maps is a whole
conversation. ``raw => true`` skips the template.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from bridge.show import show
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.backend import Backend, DoneEvent, FinishReason, GenerateRequest, OpenModel
from control.gateway.generation_text import AnswerText
from control.load_options import BadOption
from models import chat
from models.errors import ModelError

OPEN_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Checked options of a generate call."""

    max_tokens: int = 0  # 0: the room left
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    raw: bool = False
    stream_to: Pid | None = None

    @staticmethod
    def from_term(options: Mapping[Any, Term]) -> Options:
        """Raises BadOption with the option's name."""
        found: dict[str, Any] = {}
        for key, value in options.items():
            name = text_of(key)
            found[name] = _option(name, value)
        return Options(**found)


def _option(name: str, value: Term) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match name:
        case "max_tokens" if isinstance(value, int) and number and value > 0:
            return value
        case "temperature" if number and 0 <= value <= 2:
            return float(value)
        case "top_p" if number and 0 < value <= 1:
            return float(value)
        case "seed" if isinstance(value, int) and number and 0 <= value < 1 << 63:
            return value
        case "stop" if isinstance(value, str | bytes) and value:
            return (text_of(value),)
        case "stop" if isinstance(value, list) and all(isinstance(v, str | bytes) for v in value):
            return tuple(text_of(v) for v in value if v)
        case "raw" if isinstance(value, bool):
            return value
        case "stream_to" if isinstance(value, Pid):
            return value
        case "max_tokens" | "temperature" | "top_p" | "seed" | "stop" | "raw" | "stream_to":
            raise BadOption(f"{name}: {show(value, 80)} is of the wrong type or out of range")
        case _:
            raise BadOption(
                f"unknown option {name!r}; known: max_tokens, temperature, top_p, seed, stop, "
                "raw, stream_to"
            )


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of token ``index``; the last piece carries ``reason`` and ``usage``."""

    index: int
    text: str
    reason: FinishReason | None = None
    usage: tuple[int, int] = (0, 0)  # prompt tokens, completion tokens
    error: str = ""


def usage_term(usage: tuple[int, int]) -> dict[Any, Term]:
    prompt, completion = usage
    return {
        Atom("prompt_tokens"): prompt,
        Atom("completion_tokens"): completion,
        Atom("total_tokens"): prompt + completion,
    }


@dataclass(frozen=True, slots=True)
class Prepared:
    """A generation that can begin: the model is open, the prompt encoded and checked."""

    opened: OpenModel
    request: GenerateRequest
    stops: tuple[str, ...]


async def prepare(backend: Backend, model: str, prompt: Term, options: Options) -> Prepared:
    """Open the model and check the prompt.

    Raises:
        ControlError: unknown model, not ready, bad prompt.
    """
    opened = await backend.open_model(model, timeout_s=OPEN_S)
    ids = _prompt_ids(opened, prompt, raw=options.raw)
    room = opened.context_tokens - len(ids)
    if room <= 0:
        raise BadOption(
            f"the prompt has {len(ids)} tokens, the context of {opened.id} {opened.context_tokens}"
        )
    request = GenerateRequest(
        model=opened.id,
        prompt_ids=ids,
        max_tokens=min(options.max_tokens or room, room),
        temperature=options.temperature,
        top_p=options.top_p,
        seed=secrets.randbits(63) if options.seed is None else options.seed,
        stop_ids=frozenset(opened.tokenizer.eos_ids),
        request_id=f"erl-{secrets.token_hex(6)}",
    )
    return Prepared(opened, request, options.stop)


async def pieces(backend: Backend, prepared: Prepared) -> AsyncGenerator[Piece, None]:
    """The answer, piece by piece; the last has a ``reason``."""
    answer = AnswerText(prepared.opened.tokenizer.stream(), prepared.stops)
    reason: FinishReason = "error"
    error = ""
    index = 0
    async with aclosing(backend.generate(prepared.request)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, DoneEvent):
                reason, error = event.reason, event.text
                break
            delta = answer.push(event)
            if delta.text:
                yield Piece(index, delta.text)
                index += 1
            if answer.stopped:
                break
    last, reason = answer.finish(reason)
    if last.text:
        yield Piece(index, last.text)
    usage = (len(prepared.request.prompt_ids), answer.num_tokens)
    yield Piece(index, "", reason, usage, error)


def _prompt_ids(opened: OpenModel, prompt: Term, *, raw: bool) -> tuple[int, ...]:
    tokenizer, template = opened.tokenizer, opened.chat_template
    match prompt:
        case [dict(), *_] if all(isinstance(m, dict) for m in prompt):
            if template is None:
                raise BadOption(f"model {opened.id} has no chat template; give text instead")
            messages = [{text_of(k): text_of(v) for k, v in m.items()} for m in prompt]
        case str() | bytes() | list() if raw or template is None:
            ids = tokenizer.encode(text_of(prompt))
            bos = (tokenizer.bos_id,) if tokenizer.add_bos and tokenizer.bos_id is not None else ()
            if not ids and not bos:
                raise BadOption("the prompt is empty")
            return (*bos, *ids)
        case str() | bytes() | list():
            messages = [{"role": "user", "content": text_of(prompt)}]
        case _:
            raise BadOption(f"a prompt is text or a list of message maps, got {show(prompt, 80)}")
    try:
        assert template is not None, "text goes the other way without a template"
        text = chat.render(
            template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
    except ModelError as exc:
        raise BadOption(f"the chat template of {opened.id} refuses this: {exc}") from exc
    return tuple(tokenizer.encode(text))
