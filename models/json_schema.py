"""Which JSON schemas a mask enforces: a walk that refuses, by name and place, every other keyword.

llguidance compiles schemas and refuses most of what it cannot do, but takes keywords that it does
not know as annotations. Here each keyword is known, or refused.

Source: JSON Schema draft 2020-12; llguidance, docs/json_schema.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from models.errors import BadConstraint

KIND = "json_schema"
MAX_DEPTH: Final = 48  # of schemas inside schemas; llguidance's parser ends at 128 brackets
MAX_OPTIONAL: Final = 400  # properties of one object that may be left out: each is a branch
# One space, or a line break with its indent: what models write. Any amount would let a model
# write nothing else until its tokens are spent.
WHITESPACE: Final = r"\x20|\n[\x20\t]{0,64}"
GUIDANCE: Final = "x-guidance"

_ONE = ("additionalProperties", "additionalItems", "items")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_PLAIN = frozenset(
    (
        *("type", "const", "enum", "$ref", "format", "pattern", "minLength", "maxLength"),
        *("minItems", "maxItems", "required", "minProperties", "maxProperties"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Annotations: they say nothing of which values are valid.
_NOTES = frozenset(
    (
        *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default"),
        *("examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator"),
        *("contentMediaType", "contentEncoding"),
    )
)
FORMATS: Final = frozenset(
    (
        *("date-time", "time", "date", "duration", "email"),
        *("hostname", "ipv4", "ipv6", "uuid", "uri"),
    )
)
# Of what is not here, where something like it can be asked for.
_INSTEAD: Final = {
    "uniqueItems": "list the items in 'prefixItems', or check the answer yourself",
    "not": "say what is allowed instead",
    "nullable": 'write "type": [..., "null"]',
}


def parse_schema(text: str) -> Any:
    """A schema from its JSON text. Raises BadConstraint."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as exc:
        raise BadConstraint(KIND, f"no JSON: {exc}") from exc


def compiled_schema(schema: Any, *, guided: bool = False) -> dict[str, Any]:
    """The schema as llguidance is to have it: checked, with our rule for white space.

    Args:
        schema: JSON value; not changed.
        guided: it stands in a grammar and may say how its white space is written.

    Raises:
        BadConstraint: a keyword that is not enforced, or an impossible value of one.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        _refuse("$", "a schema is an object")
    guidance = schema.get(GUIDANCE) if guided else None
    if guided:
        schema = {key: value for key, value in schema.items() if key != GUIDANCE}
    walked = _Walk(schema).schema(schema, "$", 0)
    return {**walked, GUIDANCE: _guidance(guidance)}


def _guidance(given: Any) -> dict[str, Any]:
    if given is None:
        return {"whitespace_pattern": WHITESPACE}
    if not isinstance(given, dict):
        _refuse("$", f"{GUIDANCE} must be an object")
    for name in ("lenient", "coerce_one_of"):
        if given.get(name):
            _refuse("$", f"{GUIDANCE}.{name} would leave out parts of the schema")
    return given


class _Walk:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root

    def schema(self, schema: Any, at: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            _refuse(at, "a schema is an object or a boolean")
        if depth > MAX_DEPTH:
            _refuse(at, f"more than {MAX_DEPTH} schemas inside each other")
        out: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "uniqueItems" and value is False:
                continue
            here = f"{at}.{key}"
            if key in _NAMED:
                if not isinstance(value, dict):
                    _refuse(at, f"{key!r} must be an object")
                if key == "properties":
                    self._count_optional(value, schema, at)
                out[key] = {
                    name: self.schema(part, f"{here}.{name}", depth + 1)
                    for name, part in value.items()
                }
            elif key in _MANY or (key == "items" and isinstance(value, list)):
                if not isinstance(value, list):
                    _refuse(at, f"{key!r} must be a list")
                parts = [
                    self.schema(part, f"{here}[{n}]", depth + 1) for n, part in enumerate(value)
                ]
                out["anyOf" if self._is_any_of(key, value, schema) else key] = parts
            elif key in _ONE:
                out[key] = self.schema(value, here, depth + 1)
            elif key in _PLAIN:
                self._plain(key, value, schema, at)
                out[key] = value
            elif key not in _NOTES and (not key.startswith("x-") or key == GUIDANCE):
                instead = _INSTEAD.get(key)
                hint = f"; {instead}" if instead else "; remove it"
                _refuse(at, f"keyword {key!r} cannot be enforced{hint}")
        return out

    def _plain(self, key: str, value: Any, schema: Mapping[str, Any], at: str) -> None:
        if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            _refuse(at, f"{key!r} must be a number")
        if key == "format" and value not in FORMATS:
            _refuse(at, f"format {value!r} cannot be enforced; known: {', '.join(sorted(FORMATS))}")
        if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            _refuse(at, f"$ref {value!r}: only references within the schema are followed")
        if key == "minProperties":
            # Names beyond those listed may come twice, and would be counted twice.
            required = schema.get("required")
            named = len(set(required)) if isinstance(required, list) and _texts(required) else 0
            if isinstance(value, int) and value > max(1, named):
                _refuse(at, f"'minProperties' {value} is more than 'required' names: not enforced")

    def _count_optional(
        self, properties: Mapping[str, Any], schema: Mapping[str, Any], at: str
    ) -> None:
        required = schema.get("required")
        named = required if isinstance(required, list) and _texts(required) else []
        optional = len(properties.keys() - set(named))
        if optional > MAX_OPTIONAL:
            _refuse(at, f"{optional} properties that are not required; at most {MAX_OPTIONAL}")

    def _is_any_of(self, key: str, value: list[Any], schema: Mapping[str, Any]) -> bool:
        """Whether a ``oneOf`` is an ``anyOf``: a property tells its branches apart.

        llguidance sees that by itself, but not through references.
        """
        if key != "oneOf" or "anyOf" in schema:
            return False
        tags = [self._tags(part) for part in value]
        names = set.intersection(*(set(t) for t in tags)) if tags else set()
        return any(
            len({one for t in tags for one in t[name]}) == sum(len(t[name]) for t in tags)
            for name in names
        )

    def _tags(self, schema: Any) -> dict[str, set[str]]:
        """For each required property of an object that is one of few values: these, as JSON."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                break
            schema = self._resolve(schema["$ref"])
        if not isinstance(schema, dict) or schema.get("type") != "object":
            return {}
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, dict) or not isinstance(required, list):
            return {}
        found: dict[str, set[str]] = {}
        for name in required:
            part = properties.get(name) if isinstance(name, str) else None
            if isinstance(part, dict):
                values = [part["const"]] if "const" in part else part.get("enum", [])
                if isinstance(values, list) and values and _texts(values):
                    found[name] = set(values)
        return found

    def _resolve(self, ref: str) -> Any:
        value: Any = self.root
        for step in ref.removeprefix("#").split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            value = value.get(name) if isinstance(value, dict) else None
        return value


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _refuse(at: str, why: str) -> NoReturn:
    raise BadConstraint(KIND, f"at {at}: {why}")
