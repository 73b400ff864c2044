"""Conversations with tools, brought into the shape that a model's template expects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from models.chat import render
from models.errors import TemplateError
from models.tool_calls import arguments_object
from models.tool_format import ToolFormat, lists_tools
from models.tool_grammar import Tool, written_calls

Message = Mapping[str, Any]


def render_with_tools(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    form: ToolFormat,
    **more: Any,
) -> str:
    """The prompt of a conversation in which tools may be, or were, called.

    Args:
        messages: as in OpenAI's API: an assistant's may have ``tool_calls``, each with ``id`` and
            ``function`` (``name``, ``arguments`` as JSON text); one of role ``tool`` has
            ``tool_call_id`` and ``content``. Contents are texts.
        tools: that may be called now; empty where none may.
        more: as ``models.chat.render`` takes it.

    Raises:
        TemplateError: as ``models.chat.render``.
    """
    listed = lists_tools(template) and form.history != "prompt"
    given = [tool.as_json() for tool in tools] if tools and listed else None
    shaped = as_text(messages, form) if form.history == "prompt" else as_turns(messages, form)
    if tools and not listed:
        text = form.prompt.replace("{tools}", _list_of(tools)).strip()
        try:
            return render(template, _told_by_system(shaped, text), **more)
        except TemplateError:  # some templates know no system's turn
            return render(template, _told_by_user(shaped, text), **more)
    return render(template, shaped, tools=given, **more)


def as_turns(messages: Sequence[Message], form: ToolFormat) -> list[dict[str, Any]]:
    """For templates that know tools: no key without a value, arguments as they expect them."""
    names: dict[str, str] = {}
    out: list[dict[str, Any]] = []
    for message in messages:
        turn = {key: value for key, value in message.items() if value is not None}
        turn.setdefault("content", None if turn.get("tool_calls") else "")
        if not turn.get("tool_calls"):
            turn.pop("tool_calls", None)
        else:
            if not turn["content"]:
                turn["content"] = None  # templates ask for that, not for an empty text
            names |= {call.get("id", ""): call["function"]["name"] for call in turn["tool_calls"]}
            turn["tool_calls"] = [_call(call, form) for call in turn["tool_calls"]]
        if turn["role"] == "tool" and turn.get("tool_call_id") in names:
            turn.setdefault("name", names[turn["tool_call_id"]])
        out.append(turn)
    return out


def as_text(messages: Sequence[Message], form: ToolFormat) -> list[dict[str, Any]]:
    """For templates that know no tools: calls are the assistant's text, results the user's.

    Turns of one role that would follow each other are joined, since templates refuse them.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        if message.get("tool_calls"):
            calls = [
                (call["function"]["name"], call["function"]["arguments"])
                for call in message["tool_calls"]
            ]
            text = "\n".join(part for part in (text, written_calls(form, calls)) if part)
        elif role == "tool":
            role, text = "user", f"<tool_response>{text}</tool_response>"
        if out and role == "user" and out[-1]["role"] == "user":
            out[-1]["content"] += "\n" + text
        else:
            out.append({"role": role, "content": text})
    return out


def _call(call: Mapping[str, Any], form: ToolFormat) -> dict[str, Any]:
    function = call["function"]
    arguments: Any = function["arguments"]
    if form.history == "object":
        arguments = arguments_object(arguments) if arguments else {}
        if arguments is None:
            raise TemplateError(f"the arguments of {function['name']!r} are no JSON object")
    return {
        "id": call.get("id", ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _list_of(tools: Sequence[Tool]) -> str:
    return "\n".join(json.dumps(tool.as_json()["function"], ensure_ascii=False) for tool in tools)


def _told_by_system(messages: Sequence[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]


def _told_by_user(messages: Sequence[Message], text: str) -> list[Message]:
    turns = [dict(message) for message in messages]
    if turns and turns[0]["role"] == "system":
        text = f"{turns.pop(0)['content']}\n\n{text}"
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = f"{text}\n\n{turn['content']}"
            return list(turns)
    return [{"role": "user", "content": text}, *turns]
