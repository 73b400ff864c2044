"""Answers taken apart as they come: thinking, text, and calls of tools with their arguments.

Text goes in as it is generated, in pieces of any size; what is certain comes out at once. The
same events come out, joined, however the text was cut. No text is lost: what begins like a call
and is none is given back as text. Only white space beside a call or a mark of thinking goes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from models.call_scan import CallScan, Malformed, scan_for
from models.tool_format import Reasoning, ToolFormat


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Some of what the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Some of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call ``index``, counted from 0, of the tool ``name``."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Some of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is over; ``complete`` is False where the answer ended within it."""

    index: int
    complete: bool = True


Event = ReasoningDelta | ContentDelta | CallBegin | CallArguments | CallEnd


class AnswerParser:
    """Takes one answer apart.

    Args:
        tools: the form of calls; None where no tools were given, so that nothing is a call.
        tool_names: of the tools that were given. A ``bare`` object that names none of them is
            text; a marked call is one whatever its name.
        reasoning: how thinking is marked; None where the model does not think aloud.
        thinking: the prompt ended within the thinking (``Reasoning.is_open``).

    Use: for each text of ``Tokenizer.stream(shown=...)`` hand on what ``push`` gives, at the end
    what ``finish`` gives. ``num_calls`` above 0 makes the finish reason ``tool_calls`` where it
    would have been ``stop``.
    """

    def __init__(
        self,
        *,
        tools: ToolFormat | None = None,
        tool_names: Collection[str] = (),
        reasoning: Reasoning | None = None,
        thinking: bool = False,
    ) -> None:
        self._think = _Thinking(reasoning, thinking)
        self._tools = None if tools is None else _Calls(tools, frozenset(tool_names))

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return 0 if self._tools is None else self._tools.num_calls

    def push(self, text: str) -> list[Event]:
        """Take the next piece of text."""
        thought, rest = self._think.push(text)
        return self._events(thought, rest)

    def finish(self) -> list[Event]:
        """Take the end: what was held back comes out."""
        thought, rest = self._think.finish()
        events = self._events(thought, rest)
        return [*events, *([] if self._tools is None else self._tools.finish())]

    def _events(self, thought: str, rest: str) -> list[Event]:
        events: list[Event] = [ReasoningDelta(thought)] if thought else []
        if rest:
            events += [ContentDelta(rest)] if self._tools is None else self._tools.push(rest)
        return events


def parse(parser: AnswerParser, pieces: Sequence[str]) -> list[Event]:
    """All events of an answer, neighbours of a kind joined."""
    return joined([*(event for text in pieces for event in parser.push(text)), *parser.finish()])


def joined(events: Sequence[Event]) -> list[Event]:
    """Events with deltas of the same thing made one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        match last, event:
            case (ReasoningDelta(a), ReasoningDelta(b)):
                out[-1] = ReasoningDelta(a + b)
            case (ContentDelta(a), ContentDelta(b)):
                out[-1] = ContentDelta(a + b)
            case (CallArguments(i, a), CallArguments(j, b)) if i == j:
                out[-1] = CallArguments(i, a + b)
            case _:
                out.append(event)
    return out


class _Thinking:
    """Splits thinking off the beginning of an answer."""

    def __init__(self, marks: Reasoning | None, thinking: bool) -> None:
        self._marks = marks
        self._state = "text" if marks is None else "thinking" if thinking else "start"
        self._held = ""
        self._fresh = True  # nothing of this part came out yet: its first line breaks go

    def push(self, text: str) -> tuple[str, str]:
        """What is thinking, and what is answer."""
        if self._state == "text" and not self._held:
            return "", self._answer(text)
        assert self._marks is not None
        self._held += text
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(self._marks.begin):
                self._held = begun[len(self._marks.begin) :]
                self._state = "thinking"
            elif self._marks.begin.startswith(begun):
                return "", ""
            else:
                self._state, self._fresh = "text", False
                held, self._held = self._held, ""
                return "", held
        return self._until_end(self._marks.end)

    def finish(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        if self._state == "thinking":
            return held.rstrip() if not self._fresh else held.strip(), ""
        return "", held

    def _until_end(self, end: str) -> tuple[str, str]:
        if self._fresh:
            self._held = self._held.lstrip()
        at = self._held.find(end)
        if at >= 0:
            thought, rest = self._held[:at].rstrip(), self._held[at + len(end) :]
            self._state, self._fresh, self._held = "text", True, ""
            return thought, self._answer(rest)
        certain = len(self._held) - held_back(self._held, (end,))
        certain = len(self._held[:certain].rstrip())  # space before the mark is no thought
        thought, self._held = self._held[:certain], self._held[certain:]
        self._fresh = self._fresh and not thought
        return thought, ""

    def _answer(self, text: str) -> str:
        """Without the empty lines between thinking and answer."""
        if self._marks is None or not self._fresh:
            return text
        text = text.lstrip()
        self._fresh = not text
        return text


class _Calls:
    """Finds calls in the text of an answer."""

    def __init__(self, form: ToolFormat, names: frozenset[str]) -> None:
        self._form, self._names = form, names
        self._begin = "".join(form.begin).strip()
        self._bare = form.layout == "bare"
        self._text = ""  # not read yet
        self._space = ""  # white space behind what came out: goes if a call follows
        self._scan: CallScan | None = None
        self._section = ""  # what the scan has read since the last call: text, if it is no call
        self._at_start = True
        self._after_call = False
        self._open = False  # a call has begun and not ended
        self._called_here = False  # one has ended in this section
        self._events: list[Event] = []
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        self._text += text
        while self._step():
            pass
        return self._taken()

    def finish(self) -> list[Event]:
        if self._open:
            self._end_call(complete=False)
        elif self._scan is not None and not self._is_only_the_end():
            self._say(self._section)
        self._scan, self._section = None, ""
        rest, self._text = self._text, ""
        self._say(rest)
        if self._space:
            self._events.append(ContentDelta(self._space))
            self._space = ""
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        """Go on by one thing; False where more text is needed."""
        if not self._text:
            return False
        if self._scan is not None:
            return self._read(self._scan)
        return self._look_at_start() if self._bare else self._look()

    def _look(self) -> bool:
        """For the mark of a section, anywhere."""
        before, mark, behind = self._text.partition(self._begin)
        if mark:
            self._say(before)
            self._text = behind
            return self._enter(mark)
        keep = held_back(self._text, (self._begin,))
        at = len(self._text) - keep
        certain, self._text = self._text[:at], self._text[at:]
        self._say(certain)
        return False

    def _look_at_start(self) -> bool:
        """For an object, or the mark of one, with which the answer begins."""
        begun = self._text.lstrip()
        if self._at_start and not begun:
            return False
        if self._at_start and len(begun) < len(self._begin) and self._begin.startswith(begun):
            return False
        space = self._text[: len(self._text) - len(begun)]
        if self._at_start and begun.startswith(("{", self._begin or "{")):
            mark = self._begin if begun[0] != "{" else ""
            self._space, self._text = space, begun[len(mark) :]
            return self._enter(mark)
        self._at_start = False
        text, self._text = self._text, ""
        self._say(text)
        return False

    def _enter(self, mark: str) -> bool:
        self._scan = scan_for(self._form)
        self._section, self._space = self._space + mark, ""
        self._at_start = self._called_here = False
        return True

    def _read(self, scan: CallScan) -> bool:
        for at, char in enumerate(self._text):
            section = self._section
            try:
                scan.feed(char)
                self._section += char
                self._hear(scan)
            except Malformed:  # this character may begin something else
                self._section, self._text = section, self._text[at:]
                self._give_back()
                return True
            if scan.over:
                self._text = scan.excess + self._text[at + 1 :]
                self._scan, self._section = None, ""
                return True
        self._text = ""
        return False

    def _hear(self, scan: CallScan) -> None:
        """Turn what the scan found into events. Raises Malformed for what is no tool's name."""
        for kind, value in scan.found():
            if kind == "name":
                if self._bare and self._names and value not in self._names:
                    raise Malformed
                self._events.append(CallBegin(self.num_calls, value))
                self.num_calls += 1
                self._open, self._after_call = True, True
            elif kind == "arguments":
                self._events.append(CallArguments(self.num_calls - 1, value))
            else:
                self._end_call(complete=True)

    def _end_call(self, *, complete: bool) -> None:
        self._events.append(CallEnd(self.num_calls - 1, complete))
        self._open, self._section, self._called_here = False, "", complete

    def _give_back(self) -> None:
        """What follows is no call: an open one ends, and what was read since is text."""
        if self._open:
            self._end_call(complete=False)
        section, self._section, self._scan = self._section, "", None
        if self._called_here:  # its end is missing, and another section may begin here
            self._text = section + self._text
        else:
            self._say(section)

    def _is_only_the_end(self) -> bool:
        """Whether what was read since the last call is space, or the beginning of the end mark."""
        left = self._section.strip().lstrip("],;").strip()
        marks = ("".join(self._form.call_end), "".join(self._form.end))
        return self._after_call and any(mark.strip().startswith(left) for mark in (*marks, ""))

    def _say(self, text: str) -> None:
        """Text, but for white space at its end: that waits for what comes."""
        text = self._space + text
        if self._after_call:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._after_call = False
            self._events.append(ContentDelta(body))


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that one of ``marks`` begins with."""
    longest = max(map(len, marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks if len(mark) > size):
            return size
    return 0


def arguments_object(text: str) -> dict[str, object] | None:
    """Arguments as templates want them; None where they are no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
