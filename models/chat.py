"""Chat templates: messages to the prompt text, in a sandbox that bounds work and output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.nodes

from models.errors import TemplateError
from models.template_sandbox import BoundedEnvironment, Budget, current_budget

MAX_OUTPUT_CHARS = 8_000_000


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    extra: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> str:
    """The prompt that a model's own template makes of a conversation.

    Args:
        template: jinja2 source as model files carry it; from outside, so it runs sandboxed.
        messages: each with ``role`` and ``content``, more as the template wants.
        tools: JSON schemas of callable functions; None where there are none.
        add_generation_prompt: end with the opening of an assistant's turn.
        bos_token, eos_token: texts of these tokens, "" where the model has none.
        extra: further variables of the template, such as ``enable_thinking``.
        now: the date that ``strftime_now`` shows; None takes the present.

    Raises:
        TemplateError: the template is faulty, refuses these messages, or does too much.

    Source: transformers ``utils/chat_template_utils.py``, whose output this matches.
    """

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return (now or datetime.now()).strftime(form)

    token = current_budget.set(Budget(max_chars=MAX_OUTPUT_CHARS))
    try:
        parts = _compile(template).generate(
            **{
                "messages": list(messages),
                "tools": list(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": bos_token,
                "eos_token": eos_token,
                "raise_exception": refuse,
                "strftime_now": strftime_now,
                **(extra or {}),
            }
        )
        budget = current_budget.get()
        out: list[str] = []
        for part in parts:
            budget.spend_chars(len(part))
            out.append(part)
        return "".join(out)
    except jinja2.TemplateSyntaxError as exc:
        raise TemplateError(f"chat template, line {exc.lineno}: {exc.message}") from exc
    except jinja2.TemplateError as exc:
        raise TemplateError(f"chat template: {exc.message or exc}") from exc
    except Exception as exc:
        raise TemplateError(f"chat template: {type(exc).__name__}: {exc}") from exc
    finally:
        current_budget.reset(token)


@lru_cache(maxsize=64)
def names_in(template: str) -> frozenset[str]:
    """Every variable that a template reads or sets. Raises TemplateError."""
    try:
        tree = _environment().parse(template)
    except (jinja2.TemplateError, RecursionError) as exc:
        raise TemplateError(f"chat template: {exc}") from exc
    return frozenset(name.name for name in tree.find_all(jinja2.nodes.Name))


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", "models.template_sandbox.GenerationTag"],
    )
    environment.filters["tojson"] = _tojson
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes; ``indent`` is bounded like every other growth."""
    current_budget.get().check_tree(value)
    if indent is not None and not 0 <= indent <= 16:
        raise jinja2.TemplateError(f"tojson indent {indent} is out of 0 to 16")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
