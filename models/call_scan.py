"""One section of an answer that holds calls, read character by character in the form of a model."""

from __future__ import annotations

import json
import re
from typing import Final, Literal

from models.tool_format import ToolFormat

Found = tuple[Literal["name", "arguments", "end"], str]

MAX_NAME_CHARS: Final = 256
_NAME = re.compile(r"[^\s\"'<>{}\[\]()]{1,128}")
_ARGUMENT_KEYS = ("arguments", "parameters")
_BARE_KEYS = frozenset({"name", "type", "id", *_ARGUMENT_KEYS})  # others: it is no call


class Malformed(Exception):
    """This character cannot stand here: what began as a call is none."""


class JsonValue:
    """Where one JSON value ends. Brackets and quotes are balanced, nothing more is checked."""

    def __init__(self, first: str) -> None:
        self.first = first
        self.over = False
        self._depth = int(first in "{[")
        self._in_text = first == '"'
        self._escaped = False

    def takes(self, char: str) -> bool:
        """Whether ``char`` belongs to the value; afterwards ``over`` says if it was the last."""
        if self._in_text:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_text = False
                self.over = self._depth == 0
            return True
        if self._depth == 0:  # a number or a word ends before what follows
            self.over = char.isspace() or char in ",}]:;"
            return not self.over
        if char == '"':
            self._in_text = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.over = self._depth == 0
        return True


class CallScan:
    """What both kinds of sections have in common.

    Attributes:
        over: the section has ended; ``excess`` are characters at its end that are none of it.
    """

    def __init__(self, form: ToolFormat) -> None:
        self.form = form
        self.over = False
        self.excess = ""
        self._found: list[Found] = []
        self._end = "".join(form.end).strip()
        self._mark = ""  # of a marker that is being read
        self._calls = 0
        self._space = ""

    def feed(self, char: str) -> None:
        """Take the next character. Raises Malformed, and has not taken it then."""
        raise NotImplementedError

    def found(self) -> list[Found]:
        """What became certain by the last character."""
        found, self._found = self._found, []
        return found

    def _leave(self, excess: str = "") -> None:
        self.over, self.excess = True, excess


class ObjectScan(CallScan):
    """Calls as JSON objects: one, several, or a list of them."""

    def __init__(self, form: ToolFormat) -> None:
        super().__init__(form)
        self._state = "first"
        self._in_list = False
        self._begin_object()

    def _begin_object(self) -> None:
        self._key = ""
        self._value: JsonValue | None = None
        self._text = ""  # of the key or value that is being read
        self._called: str | None = None  # the name
        self._told = False  # it is told with the first of the arguments
        self._arguments: str | None = None  # those that came before the name; "" where streamed

    def feed(self, char: str) -> None:
        match self._state:
            case "value":
                self._in_value(char)
            case "key":
                self._in_key(char)
            case "next":
                self._between(char)
            case _ if char.isspace():
                return
            case "first" if char == "[" and not self._in_list and not self._calls:
                self._in_list = True
            case "first" if char == "]" and self._in_list and self._calls == 0:
                raise Malformed  # a list of nothing is no call
            case "first" if char == "{":
                self._begin_object()
                self._state = "before key"
            case "before key" if char == '"':
                self._value, self._text, self._state = JsonValue(char), char, "key"
            case "colon" if char == ":":
                self._state = "before value"
            case "before value":
                self._begin_value(char)
            case "after value" if char == ",":
                self._state = "before key"
            case "after value" if char == "}":
                self._end_object()
            case _:
                raise Malformed

    def _in_key(self, char: str) -> None:
        assert self._value is not None
        if len(self._text) > MAX_NAME_CHARS:
            raise Malformed
        self._value.takes(char)
        self._text += char
        if self._value.over:
            self._key = _unquoted(self._text)
            if self.form.layout == "bare" and self._key not in _BARE_KEYS:
                raise Malformed
            self._state = "colon"

    def _begin_value(self, char: str) -> None:
        if char in ",:}]":
            raise Malformed
        if self._key == self.form.name_key and (char != '"' or self._called):
            raise Malformed
        if self._is_arguments and (char not in '{"n' or self._arguments is not None):
            raise Malformed
        self._value, self._text, self._state = JsonValue(char), char, "value"
        self._stream(char)

    @property
    def _is_arguments(self) -> bool:
        return self._key == self.form.arguments_key or self._key in _ARGUMENT_KEYS

    def _stream(self, char: str) -> None:
        """Arguments go out as they come, where the name is known."""
        assert self._value is not None
        if self._is_arguments and self._called and self._value.first == "{":
            self._arguments = ""
            self._tell(char)

    def _tell(self, arguments: str) -> None:
        if self._called and not self._told:
            self._found.append(("name", self._called))
            self._told = True
        self._found.append(("arguments", arguments))

    def _in_value(self, char: str) -> None:
        assert self._value is not None
        taken = self._value.takes(char)
        if taken:
            keep = self._key == self.form.name_key or self._is_arguments
            self._text += char if keep else ""
            if self._key == self.form.name_key and len(self._text) > MAX_NAME_CHARS:
                raise Malformed
            self._stream(char)
        if self._value.over:
            self._end_value()
            self._state = "after value"
            if not taken:
                self.feed(char)

    def _end_value(self) -> None:
        assert self._value is not None
        if self._key == self.form.name_key:
            self._called = _checked_name(_unquoted(self._text))
        elif self._is_arguments and self._arguments is None:
            text = self._text
            if self._value.first == '"':  # some models write the object as a text
                text = _unquoted(text)
            elif self._value.first == "n":
                if text != "null":
                    raise Malformed
                text = "{}"
            self._arguments = text

    def _end_object(self) -> None:
        if self._called is None:
            raise Malformed
        if not self._told:
            self._tell("{}" if self._arguments is None else self._arguments)
        self._found.append(("end", ""))
        self._calls += 1
        self._state, self._space, self._mark = "next", "", ""
        if not self._in_list and not self._end and self.form.layout != "bare":
            self._leave()

    def _between(self, char: str) -> None:
        """Behind a call: another one, the end of the list, the end of the section."""
        if self._mark:
            if not self._end.startswith(self._mark + char):
                raise Malformed
            self._mark += char
        elif char.isspace():
            self._space += char
            return
        elif self._in_list and char in ",]":
            self._space = ""
            if char == ",":
                self._state = "first"
            else:
                self._in_list = False
                if not self._end:
                    self._leave()
            return
        elif not self._in_list and self._end and self._end.startswith(char):
            self._mark = char
        elif not self._in_list and char == "{" and self._end:
            self._state = "first"
            self.feed(char)
            return
        elif self.form.layout == "bare" and char in ";,":
            self._state = "first"
            return
        elif self.form.layout == "bare":
            self._leave(self._space + char)
            return
        else:
            raise Malformed
        if self._mark == self._end:
            self._leave()


class NamedScan(CallScan):
    """Calls as a name in text, then the arguments."""

    def __init__(self, form: ToolFormat) -> None:
        super().__init__(form)
        self._call_begin = "".join(form.call_begin).strip()
        self._name_end = "".join(form.name_end).strip()
        self._call_end = "".join(form.call_end).strip()
        self._state = "before call" if self._call_begin else "name"
        self._text = ""
        self._value: JsonValue | None = None

    def feed(self, char: str) -> None:
        match self._state:
            case "name":
                self._in_name(char)
            case "value":
                assert self._value is not None
                self._value.takes(char)
                self._found.append(("arguments", char))
                if self._value.over:
                    self._end_value()
            case "before value":
                if char == "{":
                    self._value, self._state = JsonValue(char), "value"
                    self._found.append(("arguments", char))
                elif not char.isspace():
                    raise Malformed
            case "after value":
                if self._read((self._call_end,), char):
                    self._end_call()
            case _:
                read = self._read((self._call_begin, self._end), char)
                if read == self._call_begin:
                    self._state, self._text = "name", ""
                elif read:
                    if not self._calls:
                        raise Malformed  # a section of nothing is text
                    self._leave()

    def _read(self, marks: tuple[str, ...], char: str) -> str:
        """One of ``marks`` once it is complete; white space before it does not count."""
        if not self._mark and char.isspace():
            return ""
        mark = self._mark + char
        if not any(one.startswith(mark) for one in marks if one):
            raise Malformed
        self._mark = "" if mark in marks else mark
        return mark if mark in marks else ""

    def _in_name(self, char: str) -> None:
        if len(self._text) > MAX_NAME_CHARS:
            raise Malformed
        self._text += char
        if self._text.endswith(self._name_end):
            name = self._text[: -len(self._name_end)]
            if self.form.name_cut:
                name = name.partition(self.form.name_cut)[0]
            self._found.append(("name", _checked_name(name.strip())))
            self._state = "before value"

    def _end_value(self) -> None:
        self._found.append(("end", ""))
        self._calls += 1
        self._state = "after value"
        if not self._call_end:
            self._end_call()

    def _end_call(self) -> None:
        self._state = "before call"
        if not self._call_begin:
            self._leave()


def scan_for(form: ToolFormat) -> CallScan:
    """A scan that stands behind a section's ``begin``."""
    return NamedScan(form) if form.layout == "named" else ObjectScan(form)


def _checked_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise Malformed
    return text


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        raise Malformed from None
    if not isinstance(value, str):
        raise Malformed
    return value
