"""``ctl key create|list|revoke``: who may use the HTTP API."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from bridge.term import Atom
from control.json_view import to_json
from control.keys import MAX_PER_MINUTE, SCOPES, BadKey, key_term, make_key
from ops import tables
from ops.client import ClusterClient, ask, run
from ops.commands.options import HomeOption, JsonOption, NodeOption, target
from ops.commands.output import note, show
from ops.errors import BadUsage

SECONDS_OF: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN: Final = re.compile(r"([0-9]{1,9})([smhdw])")

app = typer.Typer(no_args_is_help=True, help="API keys: who may use the HTTP API.")


@app.command()
def create(
    name: Annotated[str, typer.Option(metavar="TEXT", help="Whose it is, for `list`.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="infer|admin",
            show_default="infer",
            help="infer asks models; admin loads, unloads, swaps, places, pulls and deletes "
            "models, and keys. May be given twice: neither has the other in it.",
        ),
    ] = None,
    rate_per_minute: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=MAX_PER_MINUTE, help="Requests a minute that each node takes."
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="In 90m, 12h, 30d or 4w, or at a time such as 2030-01-31 (UTC)."
        ),
    ] = None,
    home: HomeOption = None,
    node: NodeOption = None,
    json: JsonOption = False,
) -> None:
    """Make an API key, valid on every node at once, and print it: nothing can show it again.

    From the first key on, the HTTP API asks for one.
    """
    now_s = time.time()
    try:
        key, record = make_key(
            now_s,
            name=name,
            scopes=scope or [SCOPES[0]],
            rate_per_minute=rate_per_minute or 0,
            expires_s=expires_at(expires, now_s) if expires else 0,
        )
    except BadKey as exc:
        raise BadUsage(str(exc)) from exc
    ask(target(home, node), (Atom("add_key"), key_term(record)))
    if json:
        show({**record.public(now_s), "key": key}, True, tables.details)
        return
    print(key)  # alone on stdout: KEY=$(ctl key create)
    shown = f"{record.id} ({', '.join(record.scopes)})"
    note(f"Key {shown} is valid on every node. Keep it: only its hash is kept here.")


@app.command("list")
def list_(home: HomeOption = None, node: NodeOption = None, json: JsonOption = False) -> None:
    """Show the API keys of the cluster, without what opens anything."""
    show(_rows(ask(target(home, node), Atom("keys"))), json, _table)


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="Of a key; see `ctl key list`.")],
    home: HomeOption = None,
    node: NodeOption = None,
    json: JsonOption = False,
) -> None:
    """End an API key on every node at once.

    When the last one is gone the HTTP API stays closed, unless the node was started with
    --insecure.
    """

    async def revoked(client: ClusterClient) -> int:
        await client.call((Atom("revoke_key"), id))
        return len(to_json(await client.call(Atom("keys"))))

    left = run(target(home, node), revoked)
    show({"revoked": id, "left": left}, json, tables.details)
    if not left:
        note("No key is left, and the HTTP API stays closed: `ctl key create` makes another.")


def expires_at(text: str, now_s: float) -> float:
    """Seconds since 1970 of what ``--expires`` says. Raises BadUsage."""
    span = _SPAN.fullmatch(text)
    try:
        if span:
            return now_s + int(span[1]) * SECONDS_OF[span[2]]
        at = datetime.fromisoformat(text)
        found = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as exc:
        raise BadUsage(
            f"--expires {text!r}: write a span such as 90m, 12h, 30d or 4w, or a time such as "
            "2030-01-31 or 2030-01-31T18:00"
        ) from exc
    if found <= now_s:
        raise BadUsage(f"--expires {text}: that time is over")
    return found


def _rows(term: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = to_json(term)
    return rows


def _table(rows: list[dict[str, Any]]) -> Any:
    if not rows:
        return "no keys: `ctl key create` makes one"
    shown = []
    for row in rows:
        ends = _when(row["expires_s"]) + (" (over)" if row["expired"] else "")
        shown.append(
            {
                "id": row["id"],
                "name": row["name"],
                "scopes": row["scopes"],
                "a minute": row["rate_per_minute"] or "any",
                "created": _when(row["created_s"]),
                "expires": ends,
            }
        )
    return tables.records("keys", shown)


def _when(at_s: int | None) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M}" if at_s else "never"
