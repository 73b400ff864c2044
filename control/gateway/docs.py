"""``/docs``: the routes and every accepted field, as one plain page without scripts or CDN."""

from __future__ import annotations

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
            parts.append(f"<h2><code>{escape(title)}</code></h2><p>{summary}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body:
                parts.append(_table(body["schema"], schemas))
    return "".join(parts) + "</html>"


def _table(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    schema = _resolved(schema, schemas)
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(field, schemas))}</td>"
        f"<td>{'required' if name in required else ''}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field</th><th>form</th><th></th><th></th></tr>{rows}</table>"


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
        inner = _resolved(field, schemas)
        names = ", ".join(inner.get("properties", {}))
        return f"object {{{names}}}"
    if "const" in field or "enum" in field:
        return " | ".join(str(one) for one in field.get("enum", [field.get("const")]))
    text = str(field.get("type", "value"))
    if text == "array":
        text = f"list of ({_kind(field.get('items', {}), schemas)})"
    low = field.get("minimum", field.get("minItems"))
    high = field.get("maximum", field.get("maxItems"))
    if low is not None and high is not None:
        text += f", {low} to {high}"
    elif high is not None:
        text += f", at most {high}"
    elif low is not None:
        text += f", at least {low}"
    return text
