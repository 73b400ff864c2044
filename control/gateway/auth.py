"""Who may ask for what: a key is asked for before a route, or its body, is looked at. Pure ASGI."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from control.gateway.errors import ApiError, response_for
from control.gateway.key_ring import REALM, KeyRing
from control.gateway.limits import drain
from control.keys import ADMIN, INFER

MAX_DRAIN_BYTES: Final = 16 * 2**20
READS: Final = frozenset({"GET", "HEAD"})
SAFE: Final = READS | {"OPTIONS"}
ANY_KEY: Final = ""
OPEN: Final = ("/", "/docs")  # CONTRACT section 5; all that begins with /health besides
OPEN_PREFIX: Final = "/health"

# The first line that fits says which scope a route needs. What is not here needs admin, unless it
# only reads. `keep_alive: 0` of Ollama unloads: that route asks for admin itself (`require`).
SCOPE_BY_ROUTE: Final[tuple[tuple[frozenset[str] | None, str, str], ...]] = (
    (None, "/cluster/keys", ADMIN),
    (READS, "/v1/responses/", INFER),
    (READS, "/", ANY_KEY),
    (frozenset({"POST"}), "/api/show", ANY_KEY),
    (frozenset({"POST"}), "/api/pull", ADMIN),
    (None, "/api/delete", ADMIN),
    (None, "/v1/", INFER),
    (None, "/api/", INFER),
    (None, "/", ADMIN),
)


def scope_for(method: str, path: str) -> str:
    """The scope that a request needs; empty: any key will do."""
    for methods, prefix, scope in SCOPE_BY_ROUTE:
        if (methods is None or method in methods) and path.startswith(prefix):
            return scope
    return ADMIN


def is_open_to_all(path: str) -> bool:
    """Whether a path is never closed."""
    return path in OPEN or path.startswith(OPEN_PREFIX)


def keys_in(headers: Headers) -> Iterator[bytes]:
    """What a request gives as its key, in either way."""
    for value in headers.getlist("authorization"):
        kind, _, key = value.strip().partition(" ")
        if kind.lower() == "bearer" and key.strip():
            yield key.strip().encode("latin-1")
    for value in headers.getlist("x-api-key"):
        if value.strip():
            yield value.strip().encode("latin-1")


class Guard:
    """Lets a request through to the routes, or refuses it with 401, 403 or 429.

    ``request.state`` gets ``key_id`` (empty where no key is asked for) and ``scopes``.

    Args:
        origins: web pages that may ask although no key keeps others out; see ``_check_origin``.
    """

    def __init__(self, app: ASGIApp, *, ring: KeyRing, origins: Sequence[str] = ()) -> None:
        self._app, self._ring, self._origins = app, ring, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key_id"], state["scopes"] = "", (INFER, ADMIN)
        try:
            self._check(scope)
        except ApiError as error:
            if "expect" not in Headers(scope=scope):
                await drain(receive, MAX_DRAIN_BYTES)
            await response_for(scope["path"], error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        if is_open_to_all(path):
            return
        if self._ring.is_open:
            if not self._ring.exposed:
                self._check_origin(method, headers)
            return
        key = self._ring.admit(list(keys_in(headers)))
        needed = scope_for(method, path)
        if needed and needed not in key.scopes:
            raise _forbidden(f"{method} {path}", needed)
        self._ring.spend(key)
        scope["state"]["key_id"], scope["state"]["scopes"] = key.id, key.scopes

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Only this machine is let in without keys, but its browser brings along foreign pages.

        A page whose name was made to mean 127.0.0.1 (DNS rebinding) is of the same origin for the
        browser, so the absence of CORS does not stop it. What it says of itself does.
        """
        origin = headers.get("origin", "")
        if method in SAFE or not origin or origin in self._origins or "*" in self._origins:
            return
        if not _is_local(origin):
            text = (
                "web pages of other origins may not ask: list the origin under http.cors_origins "
                "of config.yaml, or make an API key with `ctl key create`."
            )
            raise ApiError(403, text, code="foreign_origin")


def require(request: Request, scope: str) -> None:
    """Raises ApiError 403 unless the request may do what needs ``scope``."""
    if scope not in request.state.scopes:
        raise _forbidden("this", scope)


def _forbidden(what: str, scope: str) -> ApiError:
    text = f"{what} needs a key with the scope {scope!r}, which this one does not have."
    told = f'{REALM}, error="insufficient_scope", scope="{scope}"'
    return ApiError(403, text, code="insufficient_scope", headers={"WWW-Authenticate": told})


def _is_local(origin: str) -> bool:
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
