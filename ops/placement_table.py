"""The answer of ``ctl place`` as tables: the chosen shape, its ranks, and why not another."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ops.tables import Column, Record, get, half_open, plain, shape, size, size_of, table

RANKS: Final = (
    Column("rank", get("rank"), right=True),
    Column("node", get("node")),
    Column("device", get("device")),
    Column("kernels", get("kernels")),
    Column("threads", get("threads"), right=True),
    Column("layers", lambda r: half_open(r.get("layers"))),
    Column("kv heads", lambda r: half_open(r.get("kv_heads"))),
    Column("heads", lambda r: half_open(r.get("query_heads"))),
    Column("ffn", lambda r: half_open(r.get("ffn"))),
    Column("experts", lambda r: half_open(r.get("experts"))),
    Column("vocab", lambda r: half_open(r.get("vocab"))),
    Column("weights", size_of("weights_bytes"), right=True),
    Column("kv cache", size_of("kv_bytes"), right=True),
    Column("workspace", size_of("workspace_bytes"), right=True),
    Column("process", size_of("process_bytes"), right=True),
    Column("total", size_of("total_bytes"), right=True),
    Column("may take", size_of("limit_bytes"), right=True),
)


def placement(data: Record) -> RenderableType:
    """The whole of ``ctl place``."""
    shown: list[RenderableType] = [_head(data)]
    chosen = data.get("chosen")
    if chosen:
        total = size(chosen.get("total_bytes"))
        title = f"Chosen: {shape(chosen)}{_shares(chosen)}, {total} in all"
        shown += [Text(), table(title, RANKS, chosen.get("ranks") or [])]
    if data.get("rejected"):
        shown += [Text(), _rejected(data)]
    return Group(*shown)


def _head(data: Record) -> Text:
    state = "on this node"
    if data.get("state") != "local":
        stored = f"{size(data.get('size_bytes'))}, taken to be {plain(data.get('assumed'))}"
        state = f"not downloaded: estimated from its card ({stored})"
    used = data.get("used_bytes") or 0
    head = Text(f"model {plain(data.get('model'))}, {state}\n")
    head.append(f"{plain(data.get('slots'))} slots of {plain(data.get('context_tokens'))} tokens\n")
    head.append(f"{plain(data.get('node'))} lends {size(data.get('limit_bytes'))}")
    head.append(f", {size(used)} of it to other instances" if used else "")
    return head


def _rejected(data: Record) -> RenderableType:
    made = Table(title="Not chosen", title_justify="left", box=None, header_style="bold")
    made.pad_edge = False
    made.add_column("shape", no_wrap=True)
    made.add_column("why", overflow="fold")
    for one in data["rejected"]:
        made.add_row(Text(f"{shape(one)}{_shares(one)}"), Text(plain(one.get("why"))))
    return made


def _shares(record: Record) -> str:
    shares = record.get("shares") or []
    return f" shares {','.join(f'{s:g}' for s in shares)}" if len(set(shares)) > 1 else ""
