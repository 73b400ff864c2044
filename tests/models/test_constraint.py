"""What may be asked of an answer's form, and what is refused before it begins, by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models.constraint import MAX_TEXT_BYTES, Constraint, check, choice
from models.errors import BadConstraint

TAGGED: dict[str, Any] = {
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    "discriminator": {"propertyName": "is"},
    "$defs": {
        name: {"type": "object", "properties": {"is": {"const": name}}, "required": ["is"]}
        for name in ("cat", "dog")
    },
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        TREE,
        TAGGED,
        {"title": "T", "description": "d", "default": 1, "x-vendor": {}, "type": "integer"},
        {"type": "array", "uniqueItems": False, "prefixItems": [{"type": "null"}], "items": False},
        {"properties": {"not": {"type": "integer"}, "uniqueItems": {"format": "uuid"}}},
        {"enum": [{"not": 3}, None, "é"]},
        {"type": "object", "required": ["a", "b"], "minProperties": 2},
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
        {"type": "string", "pattern": "^[a-z]+$", "maxLength": 9},
    ],
)
def test_schemas_that_a_mask_enforces(schema: Any) -> None:
    check(Constraint("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"items": {"uniqueItems": True}}, r"at \$\.items: keyword 'uniqueItems'"),
        ({"properties": {"a": {"not": {}}}}, r"at \$\.properties\.a: keyword 'not'"),
        ({"if": {}, "then": {}}, "keyword 'if'"),
        ({"dependentRequired": {}}, "keyword 'dependentRequired'"),
        ({"$defs": {"a": {"contains": {}}}}, r"\$defs\.a: keyword 'contains'"),
        ({"type": "string", "nullable": True}, "keyword 'nullable' .*null"),
        ({"colour": "red"}, "keyword 'colour'"),
        ({"x-guidance": {"lenient": True}}, "keyword 'x-guidance'"),
        ({"anyOf": [{"unevaluatedProperties": False}]}, r"anyOf\[0\]: keyword"),
        ({"minProperties": 2}, "minProperties"),
        ({"format": "regex"}, "format 'regex'"),
        ({"format": "unknown"}, "format 'unknown'"),
        ({"$ref": "http://example.com/x"}, "within the schema"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"minimum": 1, "exclusiveMinimum": True}, "exclusiveMinimum"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "oneOf"),
        ({"pattern": "(?=a)"}, "look-around"),
        ({"type": "strin"}, "strin"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ({"properties": {f"p{n}": {} for n in range(500)}}, "500 properties"),
        (False, "Unsatisfiable"),
        ([], "a schema is an object"),
        ({"properties": []}, "'properties' must be an object"),
        ({"anyOf": {}}, "'anyOf' must be a list"),
        ({"items": 3}, r"\$\.items: a schema"),
    ],
)
def test_what_cannot_be_enforced_is_named(schema: Any, why: str) -> None:
    with pytest.raises(BadConstraint, match=why):
        check(Constraint("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    "text", ["", "{", "{'a': 1}", '{"minimum": NaN}', "[" * 9999, '{"minimum": ' + "1" * 5000 + "}"]
)
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(BadConstraint, match="no JSON"):
        check(Constraint("json_schema", text))


def test_depth_and_size_are_bounded() -> None:
    deep: Any = {"type": "integer"}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    with pytest.raises(BadConstraint, match="inside each other"):
        check(Constraint("json_schema", json.dumps(deep)))
    with pytest.raises(BadConstraint, match="bytes; at most"):
        check(Constraint("regex", "a" * (MAX_TEXT_BYTES + 1)))


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json_object"),
        Constraint("regex", r"[0-9]{3}-[0-9]{4}|/\"#"),
        Constraint("lark", 'start: "a" x\nx[lazy]: /.*b/'),
        Constraint("lark", 'start: <[7]> %json {"type": "integer"}'),
        choice(["yes", "no", 'with "quotes" \\ and\nlines', "日本", "/#"]),
    ],
)
def test_other_kinds(constraint: Constraint) -> None:
    check(constraint)


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        (Constraint("json_object", "x"), "takes no text"),
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("regex", "a(?=b)"), "look-around"),
        (Constraint("lark", 'x: "a"'), "no start rule"),
        (Constraint("lark", 'start: "a" b'), 'unknown name: "b"'),
        (Constraint("lark", "start: @other"), "unknown grammar"),
        (Constraint("lark", 'start: x "b"\nx[temperature=0.5]: /.*/'), "option 'temperature'"),
        (Constraint("lark", 'start: x "b"\nx[lazy, stop="c"]: /.*/'), "option 'stop'"),
        (Constraint("lark", 'start: %json {"not": {}}'), "keyword 'not'"),
        (Constraint("lark", 'start: %json {"x-guidance": {"lenient": true}}'), "lenient"),
        (Constraint("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000), "deeply nested"),
        (Constraint("choice", '["a", 3]'), "list of texts"),
        (Constraint("choice", "[]"), "1 to 5000"),
        (Constraint("choice", "a, b"), "no JSON list"),
        (Constraint("xml", "a"), "none of json_object"),  # type: ignore[arg-type]
    ],
)
def test_other_kinds_that_are_refused(constraint: Constraint, why: str) -> None:
    with pytest.raises(BadConstraint, match=why):
        check(constraint)
