"""``/docs``: the routes and every accepted field, as one plain page without scripts or CDN."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import HTMLResponse

from control.gateway.ask import INERT

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color-scheme:light dark}table{border-collapse:collapse;width:100%}"
    "td,th{border-bottom:1px solid #8884;padding:.25rem .5rem;text-align:left;vertical-align:top}"
    "code{font-family:ui-monospace,monospace}"
)
INTRO = (
    "Fields that are not listed are refused by name. <code>null</code> and an empty list ask for "
    f"nothing. A field that cannot change the answer is marked &ldquo;{INERT}&rdquo;. The same as "
    'data: <a href="/openapi.json">/openapi.json</a>.'
)


def router(app: FastAPI) -> APIRouter:
    """``GET /docs``, written from the app's own OpenAPI description."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers={"Content-Security-Policy": POLICY})

    return routes


def page(spec: dict[str, Any]) -> str:
    """HTML of an OpenAPI description: one section a route, one table a body."""
    schemas = spec.get("components", {}).get("schemas", {})
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Phalanx API</title>',
        f"<style>{STYLE}</style><h1>Phalanx API</h1><p>{INTRO}</p>",
    ]
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            title = f"{method.upper()} {path}"
            summary = escape(operation.get("summary", ""))
            parts.append(f"<h2><code>{escape(title)}</code></h2><p>{summary}.</p>")
            if "description" in operation:
                parts.append(f"<p>{escape(operation['description'])}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body:
                parts.append(_table(body["schema"], schemas))
    return "".join(parts) + "</html>"


def _table(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    rows = "".join(_rows(_resolved(schema, schemas), schemas, ""))
    return f"<table><tr><th>field</th><th>form</th><th></th><th></th></tr>{rows}</table>"


def _rows(schema: dict[str, Any], schemas: dict[str, Any], prefix: str) -> Iterator[str]:
    """One row a field, those of the objects in it below."""
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        yield (
            f"<tr><td><code>{escape(prefix + name)}</code></td>"
            f"<td>{escape(_kind(field, schemas))}</td>"
            f"<td>{'required' if name in required else ''}</td>"
            f"<td>{escape(field.get('description', ''))}</td></tr>"
        )
        for inner, mark in _objects(field, schemas):
            yield from _rows(inner, schemas, f"{prefix}{name}{mark}.")


def _objects(
    field: dict[str, Any], schemas: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects that a field may hold, each with ``[]`` where it is in a list."""
    for form in field.get("anyOf", [field]):
        if "$ref" in form:
            yield _resolved(form, schemas), ""
        elif form.get("type") == "array":
            for inner, mark in _objects(form.get("items", {}), schemas):
                yield inner, f"[]{mark}"


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found = schemas.get(name, schema)
    return found if isinstance(found, dict) else {}


def _kind(field: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A field's form in words, such as ``number, 0 to 2``."""
    if "anyOf" in field:
        forms = [_kind(one, schemas) for one in field["anyOf"] if one.get("type") != "null"]
        return " or ".join(forms)
    if "$ref" in field:
        return "object"
    if "const" in field or "enum" in field:
        return "only " + " | ".join(_number(one) for one in field.get("enum", [field.get("const")]))
    text = str(field.get("type", "value"))
    if text == "array":
        text = f"list of ({_kind(field.get('items', {}), schemas)})"
    low = field.get("minimum", field.get("minItems"))
    high = field.get("maximum", field.get("maxItems"))
    if low is not None and high is not None:
        text += f", {_number(low)} to {_number(high)}"
    elif high is not None:
        text += f", at most {_number(high)}"
    elif low is not None:
        text += f", at least {_number(low)}"
    return text


def _number(value: Any) -> str:
    """A value as JSON has it, a whole number without a fraction."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)
