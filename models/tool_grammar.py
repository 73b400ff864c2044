"""Grammars that make a model call tools in its own form, and calls of earlier turns written in it.

The arguments follow the tool's schema where that can be enforced. Where it cannot, ``strict``
tools are refused by name; others get any JSON object, since nobody asked for more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from models.constraint import Constraint, check, literal
from models.errors import BadConstraint
from models.json_schema import compiled_schema
from models.tokenizer import Tokenizer
from models.tool_format import Reasoning, ToolFormat, special_id

Choice = Literal["auto", "required", "none"]

MAX_TOOLS: Final = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ANY_OBJECT: Final[dict[str, Any]] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments.
        strict: the arguments must follow it, whatever it takes.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: ANY_OBJECT)
    strict: bool = False

    def as_json(self) -> dict[str, Any]:
        """The form in which chat templates list tools."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises BadConstraint for names that are wrong or come twice, and for too many."""
    if len(tools) > MAX_TOOLS:
        raise BadConstraint("tools", f"{len(tools)} tools; at most {MAX_TOOLS}")
    seen = set[str]()
    for tool in tools:
        if not _NAME.fullmatch(tool.name):
            raise BadConstraint("tools", f"name {tool.name!r}: 1 to 64 of letters, digits and _.-")
        if tool.name in seen:
            raise BadConstraint("tools", f"two tools have the name {tool.name!r}")
        seen.add(tool.name)


def call_constraint(
    form: ToolFormat,
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    *,
    choice: Choice = "auto",
    named: str = "",
    parallel: bool = True,
    thoughts: Reasoning | None = None,
    thinking: bool = False,
) -> Constraint | None:
    """What an answer may be, so that its calls are calls of these tools.

    Args:
        form: of the model, ``models.tool_format.tool_format``.
        choice: ``required`` at least one call and no text; ``auto`` text or calls; ``none``
            gives no constraint.
        named: exactly one call, of this tool; ``choice`` does not count then.
        parallel: more than one call may come.
        thoughts, thinking: as ``AnswerParser`` takes them; thinking may come first.

    Returns:
        None where nothing is to be enforced: for ``none``, and for ``auto`` where no tool is
        strict, since a model that may answer anything is left alone then.

    Raises:
        BadConstraint: a tool's name is wrong or unknown, or a strict schema says what cannot be
            enforced; the text names the tool. Checked as ``models.constraint.check`` does.
    """
    check_tools(tools)
    if named:
        tools = [tool for tool in tools if tool.name == named]
        if not tools:
            raise BadConstraint("tool_choice", f"no tool has the name {named!r}")
        choice, parallel = "required", False
    if choice == "none" or (choice == "auto" and not any(tool.strict for tool in tools)):
        return None
    if not tools:
        raise BadConstraint("tool_choice", "'required' needs at least one tool")
    write = _Writer(form, lambda piece: special_id(tokenizer, piece))
    text = "\n".join(write.rules(tools, choice=choice, parallel=parallel))
    found = Constraint("lark", text, before_answer(thoughts, tokenizer, thinking=thinking))
    check(found)
    return found


def after_thinking(
    constraint: Constraint,
    thoughts: Reasoning | None,
    tokenizer: Tokenizer,
    *,
    thinking: bool = False,
) -> Constraint:
    """The same form for the answer of a model that may think aloud first.

    Args:
        thoughts: how it marks that; None leaves the constraint as it is.
        thinking: the prompt ended within the thinking.
    """
    before = before_answer(thoughts, tokenizer, thinking=thinking)
    return Constraint(constraint.kind, constraint.text, before)


def before_answer(thoughts: Reasoning | None, tokenizer: Tokenizer, *, thinking: bool) -> str:
    """Lark rules for ``Constraint.before``."""
    if thoughts is None:
        return ""

    def mark(piece: str) -> str:
        return _piece(piece, special_id(tokenizer, piece))

    if special_id(tokenizer, thoughts.end) is not None:
        rest = f"thought {mark(thoughts.end)} gap\nthought: /(?s:.*)/"
    else:
        rest = f"thought gap\nthought[lazy]: /(?s:.*){_in_regex(thoughts.end)}/"
    gap = "gap: /\\n{0,2}/"
    if thinking:
        return f"before: {rest}\n{gap}"
    # Text before an answer is its own thinking or nothing.
    return f"before: thoughts?\nthoughts: {mark(thoughts.begin)} {rest}\n{gap}"


class _Writer:
    """Writes the rules of one form."""

    def __init__(self, form: ToolFormat, special: Callable[[str], int | None]) -> None:
        self.form, self.special = form, special

    def rules(self, tools: Sequence[Tool], *, choice: Choice, parallel: bool) -> list[str]:
        calls = [f"call{n}" for n in range(len(tools))]
        rules = [f"call: {' | '.join(calls)}"]
        for rule, tool in zip(calls, tools, strict=True):
            rules += [f"{rule}: {self.call(tool)} {rule}_end", f"{rule}_end: {self.call_end()}"]
        form, begin, end = self.form, self.marks(self.form.begin), self.marks(self.form.end)
        between = literal(form.between) if form.between else ""
        match form.layout:
            case "bare":
                body = f"call ({between} call)*" if parallel else "call"
                section = f"({begin})? {body}"
                many = "section"
            case "array":
                body = f"call ({between} call)*" if parallel else "call"
                section = f'{begin} " "? "[" {body} "]" {end}'
                many = "section"
            case "named" if form.call_begin:
                body = f"call ({between} call)*" if parallel else "call"
                section = f"{begin} {body} {end}"
                many = "section"
            case _:
                section = f"{begin} call {end}"
                many = f"section ({between} section)*" if parallel else "section"
        if choice == "required":
            return [f"start: {many}", f"section: {section}", *rules]
        return [*self.or_text(section, begin, between, parallel=parallel), *rules]

    def or_text(self, section: str, begin: str, between: str, *, parallel: bool) -> list[str]:
        """An answer that is text, or text and then calls."""
        form, first = self.form, self.form.begin[0]
        if form.layout == "bare":
            marked = "" if self.special(first) is not None else f" & ~/{_in_regex(first)}(?s:.*)/"
            return [
                "start: text | section",
                f"text: TEXT\nTEXT: /(?s:\\s*|\\s*[^{{\\s].*)/{marked}",
                f"section: {section}",
            ]
        more = f"({between} section)*" if parallel and "call (" not in section else ""
        if self.special(first) is not None:
            return [
                f"start: text | text section {more}",
                "text: /(?s:.*)/",
                f"section: {section}",
            ]
        # The mark is text: once it is written, a call follows.
        rest = section.removeprefix(begin).strip()
        behind = " ".join(_piece(piece, self.special(piece)) for piece in form.begin[1:])
        return [
            f"start: text | head {behind} {rest} {more}",
            "text: /(?s:.*)/",
            f"head[lazy]: /(?s:.*){_in_regex(first)}/",
            f"section: {section}",
        ]

    def call(self, tool: Tool) -> str:
        """Up to the end of the arguments."""
        arguments = f"%json {json.dumps(self.schema(tool), ensure_ascii=False)}"
        if self.form.layout == "named":
            begin, end = self.marks(self.form.call_begin), self.marks(self.form.name_end)
            return f"{begin} {literal(tool.name)} {end} {arguments}"
        form = self.form
        opening = f'{{"{form.name_key}": {json.dumps(tool.name)}, "{form.arguments_key}": '
        return f"{literal(opening)} {arguments}"

    def call_end(self) -> str:
        return self.marks(self.form.call_end) or '""' if self.form.layout == "named" else '"}"'

    def schema(self, tool: Tool) -> dict[str, Any]:
        """What the arguments must be. Raises BadConstraint for a strict tool."""
        parameters = {**tool.parameters, "type": "object"}
        try:
            checked = compiled_schema(parameters)
            check(Constraint("json_schema", json.dumps(parameters)))
        except BadConstraint as exc:
            if tool.strict:
                raise BadConstraint("tools", f"{tool.name}: parameters: {exc.why}") from exc
            return compiled_schema(ANY_OBJECT)
        return checked

    def marks(self, pieces: Sequence[str]) -> str:
        return " ".join(_piece(piece, self.special(piece)) for piece in pieces)


def _piece(piece: str, token_id: int | None) -> str:
    return literal(piece) if token_id is None else f"<[{token_id}]>"


def _in_regex(text: str) -> str:
    return re.sub(r"([\\/.*+?()\[\]{}|^$&~#-])", r"\\\1", text)


def written_calls(form: ToolFormat, calls: Sequence[tuple[str, str]]) -> str:
    """Calls (name, JSON text of the arguments) as the model would have written them."""
    begin, end = "".join(form.begin), "".join(form.end)
    if form.layout == "named":
        around = "".join(form.call_begin), "".join(form.name_end), "".join(form.call_end)
        texts = [f"{around[0]}{name}{around[1]}{given}{around[2]}" for name, given in calls]
        if not form.call_begin:
            return "".join(begin + text + end for text in texts)
        return begin + form.between.join(texts) + end
    texts = [
        f'{{"{form.name_key}": {json.dumps(name, ensure_ascii=False)}, '
        f'"{form.arguments_key}": {given}}}'
        for name, given in calls
    ]
    match form.layout:
        case "array":
            return f"{begin}[{form.between.join(texts)}]{end}"
        case "bare":
            return form.between.join(texts)
        case _:
            return form.between.join(begin + text + end for text in texts)
