"""What Tab offers in ``ctl shell``: functions, options, and the names that a node knows."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from bridge.term import Atom
from control.json_view import to_json
from ops.client import ClusterClient
from ops.errors import OpsError
from ops.shell import LEAVE, NAMES, option_names

ANSWER_S: Final = 2.0  # who presses Tab does not wait longer

_NAME: Final = re.compile(r"\w*\Z")
_TEXT: Final = re.compile(r"""(\w+)\(((?:"[^"]*"\s*,\s*|'[^']*'\s*,\s*)*)["']([^"']*)\Z""")
_WHOLE_TEXT: Final = re.compile(r"""(?:"[^"]*"|'[^']*')""")
_OPTION: Final = re.compile(r"(\w+)\(.*[,(]\s*(\w*)\Z")
# Which question a function's texts are answers to, one after the other.
_ABOUT: Final = {
    "load": ("models",),
    "generate": ("instances",),
    "unload": ("instances",),
    "swap": ("instances", "models"),
    "state": ("tree",),
    "kill": ("tree",),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the text before the cursor asks for: words that begin with ``start``.

    ``about`` is the call of ``cluster`` whose answer has them; empty: ``words`` are all.
    """

    start: str
    about: str = ""
    words: tuple[str, ...] = ()


def wanted(before: str) -> Wanted:
    """Pure rule: what to offer after ``before``, the text left of the cursor."""
    before = before.lstrip()
    if _NAME.match(before):
        return Wanted(before, words=(*(f"{name}(" for name in NAMES), *sorted(LEAVE)))
    if found := _TEXT.match(before):
        about = _ABOUT.get(found[1], ())
        index = len(_WHOLE_TEXT.findall(found[2]))
        return Wanted(found[3], about=about[index] if index < len(about) else "")
    if (found := _OPTION.match(before)) and found[1] in NAMES:
        return Wanted(found[2], words=tuple(f"{name}=" for name in option_names(found[1])))
    return Wanted("")


class ShellCompleter(Completer):
    """Asks the node where names of its own are wanted."""

    def __init__(self, client: ClusterClient) -> None:
        self._client = client

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Without asking the node."""
        asked = wanted(document.text_before_cursor)
        return _completions(asked, asked.words)

    async def get_completions_async(
        self, document: Document, complete_event: CompleteEvent
    ) -> AsyncGenerator[Completion, None]:
        asked = wanted(document.text_before_cursor)
        words = await self._words(asked.about) if asked.about else asked.words
        for completion in _completions(asked, words):
            yield completion

    async def _words(self, about: str) -> tuple[str, ...]:
        try:
            found = to_json(await self._client.call(Atom(about), timeout_s=ANSWER_S))
        except OpsError:  # no help then; the line itself will say what is wrong
            return ()
        return tuple(sorted(set(_names_in(found, about))))


def _completions(asked: Wanted, words: Iterable[str]) -> Iterator[Completion]:
    for word in words:
        if word.startswith(asked.start):
            yield Completion(word, start_position=-len(asked.start))


def _names_in(answer: Any, about: str) -> Iterator[str]:
    if about == "tree":
        pending = [answer]
        while pending:
            record = pending.pop()
            yield str(record.get("id") or record.get("name"))
            pending += record.get("children") or []
        return
    for record in answer:
        yield str(record["id"])
        if about == "instances":
            yield str(record["model"])
