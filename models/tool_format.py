"""How models write calls of tools, as data: one file in ``tool_formats/`` for each form.

Which form a model speaks is read off its chat template: the texts that mark calls stand in it. A
card may name one. A template that knows nothing of tools gets the form ``generic``, which lists
the tools in the system's turn.
"""

from __future__ import annotations

import secrets
import string
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from models.chat import names_in
from models.errors import TemplateError
from models.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "tool_formats"
GENERIC: Final = "generic"

Layout = Literal["object", "array", "bare", "named"]
History = Literal["object", "text", "prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One form. Markers are lists of pieces: each a token of its own where the vocabulary has it.

    Attributes:
        rank: formats are tried in this order.
        template_has: one of these sets of texts is in the template, and none of
            ``template_lacks``.
        layout: ``object`` a JSON object between ``begin`` and ``end``, for each call;
            ``array`` a JSON list of such objects; ``bare`` objects that are the whole answer,
            where ``begin`` may be left out; ``named`` the name as text, then the arguments.
        between: what a model writes between calls.
        name_key, arguments_key: of a call's object.
        call_begin, name_end, call_end: around the name and arguments, in ``named``.
        name_cut: the name ends here, what follows up to ``name_end`` is no part of it.
        history: how calls of earlier turns are given to the template: with their arguments as
            ``object`` or JSON ``text``; ``prompt``: the template knows no tools, so as text.
        prompt: for the system's turn where the template does not list tools; ``{tools}`` stands
            for them.
        call_id_chars: letters and digits of a call's id; 0 takes any id.
    """

    id: str
    rank: int
    template_has: list[list[str]]
    layout: Layout
    begin: list[str]
    end: list[str]
    between: str
    history: History
    template_lacks: tuple[str, ...] | list[str] = ()
    name_key: str = ""
    arguments_key: str = ""
    call_begin: tuple[str, ...] | list[str] = ()
    name_end: tuple[str, ...] | list[str] = ()
    call_end: tuple[str, ...] | list[str] = ()
    name_cut: str = ""
    prompt: str = ""
    call_id_chars: int = 0

    def new_call_id(self) -> str:
        """An id for a call, as the model's template accepts it in the next turn."""
        chars = string.ascii_letters + string.digits
        prefix = "" if self.call_id_chars else "call_"
        return prefix + "".join(secrets.choice(chars) for _ in range(self.call_id_chars or 24))

    def shown_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Control tokens that mark calls: text of an answer must show them to be parsed.

        For ``Tokenizer.stream(shown=...)``.
        """
        pieces = (*self.begin, *self.end, *self.call_begin, *self.name_end, *self.call_end)
        found = (special_id(tokenizer, piece) for piece in (*pieces, self.name_cut))
        return frozenset(token_id for token_id in found if token_id is not None)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How a model marks what it thinks before its answer."""

    id: str
    template_has: tuple[str, ...]
    begin: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether a rendered prompt ends within the thinking, so that the answer begins there."""
        return prompt.rstrip().endswith(self.begin)

    def shown_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """As ``ToolFormat.shown_ids``."""
        found = (special_id(tokenizer, piece) for piece in (self.begin, self.end))
        return frozenset(token_id for token_id in found if token_id is not None)


def special_id(tokenizer: Tokenizer, piece: str) -> int | None:
    """The control token that is spelled so; None where it is ordinary text."""
    token_id = tokenizer.id_of(piece) if piece else None
    return token_id if token_id in tokenizer.special_ids else None


@lru_cache(maxsize=1)
def tool_formats() -> Mapping[str, ToolFormat]:
    """All forms by id, in the order in which they are tried."""
    known = {field.name for field in fields(ToolFormat)}
    found = []
    for path in sorted(FOLDER.glob("*.toml")):
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        assert values.keys() <= known, f"{path}: unknown field"
        found.append(ToolFormat(**values))
    return {one.id: one for one in sorted(found, key=lambda one: (one.rank, one.id))}


@lru_cache(maxsize=1)
def reasoning_formats() -> Mapping[str, Reasoning]:
    """All ways to mark thinking by id, in the order in which they are tried."""
    table = tomllib.loads((FOLDER.parent / "reasoning.toml").read_text(encoding="utf-8"))
    return {
        one["id"]: Reasoning(one["id"], tuple(one["template_has"]), one["begin"], one["end"])
        for one in table["formats"]
    }


def tool_format(template: str | None, *, named: str = "") -> ToolFormat:
    """The form of a model's calls.

    Args:
        template: its chat template.
        named: by its card; "" leaves it to the template.
    """
    if named:
        return tool_formats()[named]
    text = template or ""
    return next(
        one
        for one in tool_formats().values()
        if any(all(part in text for part in parts) for parts in one.template_has)
        and not any(part in text for part in one.template_lacks)
    )


def lists_tools(template: str) -> bool:
    """Whether a template shows the model which tools there are."""
    try:
        return "tools" in names_in(template)
    except TemplateError:
        return False  # whoever renders it says why


def reasoning(template: str | None, *, named: str = "") -> Reasoning | None:
    """How a model marks its thinking; None for one that does not think aloud."""
    if named:
        return reasoning_formats()[named]
    text = template or ""
    return next(
        (
            one
            for one in reasoning_formats().values()
            if all(part in text for part in one.template_has)
        ),
        None,
    )
