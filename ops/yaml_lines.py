"""YAML that remembers lines: plain data, and where each of its fields stands in the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]  # keys and indexes from the root to a field
MAX_BYTES = 2**20
MAX_DEPTH = 20
_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")
}


class YamlError(Exception):
    """The text is not YAML that we take: ``line`` (from 1), ``field`` path, ``why``."""

    def __init__(self, line: int, field: Path, why: str) -> None:
        super().__init__(line, field, why)
        self.line, self.field, self.why = line, field, why


@dataclass(frozen=True, slots=True)
class Document:
    """Data of dicts (string keys), lists, str, int, float, bool, None; lines count from 1."""

    data: Any
    lines: Mapping[Path, int]

    def line_of(self, path: Path) -> int:
        """Line of a field, or of the nearest parent for one that is not in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return 1


class _Loader(yaml.SafeLoader):
    """Refuses aliases: a few lines of them unfold to gigabytes, or to a loop."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_mark()
            raise YamlError(mark.line + 1, (), "aliases (*name) are not taken: write it out")
        return super().compose_node(parent, index)


def parse(text: str) -> Document:
    """Read one YAML document. Raises YamlError.

    Narrower than YAML where YAML surprises: a key twice, a key that is no text, aliases, tags and
    dates are errors.
    """
    if len(text) > MAX_BYTES:
        raise YamlError(1, (), f"a configuration has at most {MAX_BYTES} characters")
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            lines: dict[Path, int] = {(): 1}
            data = {} if root is None else _plain(loader, root, (), lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        why = ", ".join(part for part in (exc.context, exc.problem) if part)
        raise YamlError(mark.line + 1 if mark else 1, (), f"not valid YAML: {why}") from exc
    except RecursionError as exc:
        raise YamlError(1, (), f"nested more than {MAX_DEPTH} deep") from exc
    except (yaml.YAMLError, ValueError) as exc:  # ValueError: an int of thousands of digits
        raise YamlError(1, (), f"not valid YAML: {exc}") from exc
    return Document(data, lines)


def _plain(loader: yaml.SafeLoader, node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if len(path) > MAX_DEPTH:
        raise YamlError(line, path, f"nested more than {MAX_DEPTH} deep")
    if node.tag not in _TAGS:
        raise YamlError(line, path, f"{node.value!r} is read as {node.tag}: quote it")
    if isinstance(node, yaml.MappingNode):
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise YamlError(key_line, path, f"{key_node.value!r} is not a field name")
            key = key_node.value
            here = (*path, key)
            if key in made:
                raise YamlError(key_line, here, f"written twice, first in line {lines[here]}")
            lines[here] = key_line
            made[key] = _plain(loader, value_node, here, lines)
        return made
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, n, (*path, i), lines) for i, n in enumerate(node.value)]
    value = loader.construct_object(node, deep=True)
    if isinstance(value, float) and not math.isfinite(value):
        raise YamlError(line, path, f"{node.value} is not a number that can be used here")
    return value
