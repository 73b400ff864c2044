"""A jinja2 sandbox in which a template from outside can use neither much time nor much memory.

jinja2's own sandbox keeps a template away from Python; it does not stop ``x * 10**9`` or loops
inside loops. Here every loop step and every text that can grow is charged to a budget.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 500_000
MAX_BITS = 8192
# Methods of str that make a text of any length out of a number.
GROWING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "translate"})
# A width of four digits or more, or one that is itself computed.
_WIDE = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{4})")
GROWING_FILTERS = ("center", "indent", "format", "wordwrap", "batch", "slice", "xmlattr", "pprint")


class Budget:
    """What one rendering may still do: loop steps, size of one value, sum of all values made."""

    def __init__(self, *, max_chars: int, max_steps: int = MAX_STEPS) -> None:
        self.max_chars, self.max_steps = max_chars, max_steps
        self.chars, self.steps, self.made = 0, 0, 0

    def spend_chars(self, count: int) -> None:
        """Charge text that was made. Raises jinja2.TemplateError beyond the limit."""
        self.chars += count
        if self.chars > self.max_chars:
            raise jinja2.TemplateError(f"output is longer than {self.max_chars} characters")

    def check_size(self, count: int) -> None:
        """Charge a value about to be made; refuse one larger than any output may be."""
        self.made += count
        if count > self.max_chars:
            raise jinja2.TemplateError(f"a value of {count} items is longer than {self.max_chars}")
        if self.made > 16 * self.max_chars:
            raise jinja2.TemplateError(f"more than {16 * self.max_chars} items were made")

    def check_tree(self, value: Any) -> None:
        """Charge the text that nested lists and maps would become."""
        pending, count = [value], 0
        while pending:
            item = pending.pop()
            self.spend_step()
            count += len(item) if isinstance(item, str) else 1
            if isinstance(item, Mapping):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                pending += item
            if len(pending) > self.max_steps or count > self.max_chars:
                break
        self.check_size(count + len(pending))

    def spend_step(self) -> None:
        """Charge one step of work. Raises jinja2.TemplateError beyond the limit."""
        self.steps += 1
        if self.steps > self.max_steps:
            raise jinja2.TemplateError(f"more than {self.max_steps} steps of work")


current_budget: ContextVar[Budget] = ContextVar("current_budget")


class _Charge(NodeTransformer):
    """Rewrites a parsed template so that loops and ``~`` go through the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count the steps of every loop."""
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not allowed", node.lineno)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Join through a filter that checks the length first."""
        items = nodes.List(node.nodes, lineno=node.lineno)
        joined = nodes.Filter(items, "_joined", [], [], None, None, lineno=node.lineno)
        return self.generic_visit(joined)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with a budget; ``current_budget`` must be set to render."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_checked, **options)
        for name in GROWING_FILTERS:
            self.filters.pop(name, None)
        self.filters["string"] = _string
        self.filters["_counted"] = _counted
        self.filters["_joined"] = _joined
        self.filters["join"] = _join
        self.filters["replace"] = _replace
        self.filters["indent"] = _indent
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        changed = _Charge().visit(tree)
        assert isinstance(changed, nodes.Template)
        return changed

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuses the methods of str that pad or format to any length."""
        if isinstance(obj, str | bytes) and attr in GROWING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format, for formats that do not pad to great widths."""
        owner = getattr(value, "__self__", None)
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and isinstance(owner, str) and _WIDE.search(owner):
            raise jinja2.TemplateError("a format with a great width is not allowed")
        return wrapped

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What captured blocks and macros are made of."""
        texts = list(parts)
        current_budget.get().check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic, with the size of a result checked before it is made."""
        budget = current_budget.get()
        if operator == "+" and _sized(left) and _sized(right):
            budget.check_size(len(left) + len(right))
        elif operator == "*" and (_sized(left) or _sized(right)):
            sized, times = (left, right) if _sized(left) else (right, left)
            if isinstance(times, int):
                budget.check_size(len(sized) * max(times, 0))
        elif operator == "%" and isinstance(left, str | bytes):
            raise jinja2.TemplateError("the % operator does not format text here")
        elif operator in ("*", "**") and _bits(left) * _weight(operator, right) > MAX_BITS:
            raise jinja2.TemplateError("a number grew too large")
        budget.spend_step()
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls, with the methods of str that multiply text checked first."""
        current_budget.get().spend_step()
        owner, method = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and args:
            if method == "replace" and len(args) > 1:
                _check_replace(owner, args[0], args[1])
            elif method == "join":
                return _join_checked(owner, list(_counted(args[0])))
        return super().call(context, obj, *args, **kwargs)


class GenerationTag(Extension):
    """``{% generation %}``: marks the assistant's part for training; its body is just shown."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 asks for

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _sized(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _weight(operator: str, right: Any) -> int:
    """By how much the right side multiplies the bits of the left."""
    if not isinstance(right, int):
        return 1
    return abs(right) if operator == "**" else 1 + right.bit_length() // 64


def _checked(value: Any) -> Any:
    if not isinstance(value, str | int | float | None):
        current_budget.get().check_tree(value)
    return value


def _string(value: Any) -> str:
    return str(_checked(value))


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    budget = current_budget.get()
    for value in values:
        budget.spend_step()
        yield value


def _joined(values: list[Any]) -> str:
    return _join_checked("", values)


def _join(values: Iterable[Any], separator: Any = "", attribute: str | None = None) -> str:
    items = list(_counted(values))
    if attribute is not None:
        items = [item.get(attribute, "") if isinstance(item, dict) else "" for item in items]
    return _join_checked(str(separator), items)


def _join_checked(separator: str, values: list[Any]) -> str:
    texts = [_string(value) for value in values]
    current_budget.get().check_size(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    source = str(text)
    _check_replace(source, str(old), str(new))
    return source.replace(str(old), str(new), count)


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        current_budget.get().check_size(len(text) + (text.count(old) + 1) * len(new))


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * min(int(width), 64)
    lines = str(text).split("\n")
    current_budget.get().check_size(len(str(text)) + len(pad) * len(lines))
    shown = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([(pad if first else "") + lines[0], *shown])
