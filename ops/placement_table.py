"""The answer of ``ctl place`` as tables: the chosen shape, its ranks, and why not another."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from control.plan_text import seconds
from ops.tables import Column, Record, get, half_open, plain, shape, size, size_of, table

RANKS: Final = (
    Column("rank", get("rank"), right=True),
    Column("node", get("node")),
    Column("device", get("device")),
    Column("kernels", get("kernels")),
    Column("threads", get("threads"), right=True),
    Column("share", lambda r: _percent(r.get("share")), right=True),
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
MACHINES: Final = (
    Column("node", get("node")),
    Column("roles", get("roles")),
    Column("cores", get("cores"), right=True),
    Column("lends", size_of("limit_bytes"), right=True),
    Column("used", size_of("used_bytes"), right=True),
    Column("free on GPUs", lambda r: ", ".join(map(size, r.get("cuda_free_bytes") or []))),
    Column("files", lambda r: "yes" if r.get("has_files") else ""),
    Column("speed", lambda r: _speeds(r.get("speeds") or [])),
)
FENCED: Final = (Column("node", get("node")), Column("why", get("why")))


def placement(data: Record) -> RenderableType:
    """The whole of ``ctl place``."""
    shown: list[RenderableType] = [_head(data)]
    if len(data.get("machines") or []) > 1:
        shown += [Text(), table("Machines", MACHINES, data["machines"])]
    chosen = data.get("chosen")
    if chosen:
        total = size(chosen.get("total_bytes"))
        title = f"Chosen: {shape(chosen)}{_shares(chosen)}, {total} in all"
        shown += [Text(), table(title, RANKS, chosen.get("ranks") or [])]
        if chosen.get("estimate"):
            shown += [Text(), _estimate(chosen["estimate"])]
    if data.get("rejected"):
        shown += [Text(), _rejected(data)]
    if data.get("fenced"):
        shown += [Text(), table("Machines that take no rank", FENCED, data["fenced"])]
    return Group(*shown)


def _head(data: Record) -> Text:
    state = "on this node"
    if data.get("state") != "local":
        stored = f"{size(data.get('size_bytes'))}, taken to be {plain(data.get('assumed'))}"
        state = f"not downloaded: estimated from its card ({stored})"
    machines = data.get("machines") or []
    files = [one["node"] for one in machines if one.get("has_files")]
    if len(machines) > 1 and files:
        state = f"files on {plain(files)}"
    used = data.get("used_bytes") or 0
    head = Text(f"model {plain(data.get('model'))}, {state}\n")
    head.append(f"{plain(data.get('slots'))} slots of {plain(data.get('context_tokens'))} tokens")
    if data.get("goal"):
        head.append(f", for least {data['goal']}" if data["goal"] == "latency" else "")
        head.append(", for most throughput" if data["goal"] == "throughput" else "")
        head.append(f"; {plain(data.get('considered'))} arrangements considered")
    if data.get("node"):
        head.append(f"\n{plain(data['node'])} lends {size(data.get('limit_bytes'))}")
        head.append(f", {size(used)} of it to other instances" if used else "")
    return head


def _estimate(one: Record) -> Text:
    """What the chosen one would do, and what a token's time is made of."""
    alone = one.get("goal") == "latency"
    parts = {"multiplying": "compute_s", "sums": "sums_s", "hops": "hops_s", "head": "head_s"}
    made_of = ", ".join(f"{name} {seconds(one[key])}" for name, key in parts.items() if one[key])
    who = "one request" if alone else "all slots"
    text = f"Estimate: a token every {seconds(one['token_s'])} ({made_of}), "
    text += f"{one['tokens_per_s']:.3g} tokens/s for {who}, prompts included"
    text += f"; starts in {seconds(one['start_s'])}" if one["start_s"] else ""
    return Text(text)


def _rejected(data: Record) -> RenderableType:
    made = Table(title="Not chosen", title_justify="left", box=None, header_style="bold")
    made.pad_edge = False
    estimated = any(one.get("estimate") for one in data["rejected"])
    made.add_column("shape", no_wrap=True)
    for heading in ("a token", "tokens/s", "start") if estimated else ():
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("why", overflow="fold")
    for one in data["rejected"]:
        cells = [f"{shape(one)}{_shares(one)}"]
        if estimated:
            found = one.get("estimate")
            cells += _figures(found) if found else [""] * 3
        made.add_row(*(Text(cell) for cell in cells), Text(f"{_nodes(one)}{plain(one.get('why'))}"))
    return made


def _figures(one: Record) -> list[str]:
    return [seconds(one["token_s"]), f"{one['tokens_per_s']:.3g}", seconds(one["start_s"])]


def _nodes(one: Record) -> str:
    """Where its ranks would be, where there is a choice."""
    nodes = list(dict.fromkeys(str(rank.get("node")) for rank in one.get("ranks") or []))
    return f"on {plain(nodes)}: " if nodes and one.get("estimate") else ""


def _percent(share: object) -> str:
    return f"{100 * share:.3g} %" if isinstance(share, float) else "-"


def _speeds(speeds: list[Record]) -> str:
    """Billions of weights a second of each device."""
    return ", ".join(
        f"{plain(one.get('device'))} {one['weights_per_s'] / 1e9:.3g} G weights/s" for one in speeds
    )


def _shares(record: Record) -> str:
    shares = record.get("shares") or []
    return f" shares {','.join(f'{s:g}' for s in shares)}" if len(set(shares)) > 1 else ""
