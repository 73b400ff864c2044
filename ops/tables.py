"""JSON data of the cluster as Rich tables and trees, for people to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from control.topology import Topology, draw

Record = Mapping[str, Any]

STATE_STYLE: Final = {
    "ready": "green",
    "up": "green",
    "running": "green",
    "local": "green",
    "pulling": "yellow",
    "partial": "yellow",
    "loading": "yellow",
    "recovering": "yellow",
    "restarting": "yellow",
    "draining": "yellow",
    "failed": "bold red",
    "down": "bold red",
    "refused": "bold red",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and the text of one record under it."""

    heading: str
    text: Callable[[Record], str]
    right: bool = False
    states: bool = False  # coloured as STATE_STYLE says


def plain(value: object) -> str:
    """Any value as one line, without what a terminal would obey."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return printable(", ".join(f"{k} {plain(v)}" for k, v in value.items()))
    if isinstance(value, list | tuple):
        return printable(", ".join(plain(item) for item in value)) or "-"
    return printable(str(value)).replace("\n", " ")


def printable(text: str) -> str:
    """``text`` without control characters, but for line ends and tabs: models write anything."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or not _is_control(c))


def _is_control(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160


def size(value: object) -> str:
    """Bytes for people; ``-`` where it is not known."""
    return decimal(value) if isinstance(value, int) and value > 0 else "-"


def get(key: str) -> Callable[[Record], str]:
    """The text of a value."""
    return lambda record: plain(record.get(key))


def size_of(key: str) -> Callable[[Record], str]:
    """The text of a number of bytes."""
    return lambda record: size(record.get(key))


def _memory(record: Record) -> str:
    memory = record.get("memory") or {}
    text = f"{size(memory.get('available_bytes'))} of {size(memory.get('total_bytes'))}"
    return f"{text}, limit {size(limit)}" if (limit := memory.get("limit_bytes")) else text


def _devices(record: Record) -> str:
    return ", ".join(
        f"{plain(device.get('kind'))} {plain(device.get('name'))}"
        for device in record.get("devices") or []
    )


def half_open(value: object) -> str:
    """A range as ``0..30``; ``-`` for none and for an empty one."""
    full = isinstance(value, list) and len(value) == 2 and value[0] < value[1]
    return f"{value[0]}..{value[1]}" if full and isinstance(value, list) else "-"


def shape(record: Record) -> str:
    """How an instance is cut: ``tensor 2x1``."""
    return (
        f"{plain(record.get('strategy'))} "
        f"{plain(record.get('tensor_size'))}x{plain(record.get('pipeline_size'))}"
    )


def _progress(record: Record) -> str:
    ranks = record.get("ranks") or []
    total = sum(rank.get("load_total") or 0 for rank in ranks)
    if record.get("state") not in ("loading", "recovering") or not total:
        return plain(record.get("state"))
    done = sum(rank.get("load_done") or 0 for rank in ranks)
    return f"{plain(record.get('state'))} {100 * done // total} %"


def _percent(record: Record) -> str:
    done, total = record.get("done_bytes") or 0, record.get("total_bytes") or 0
    return f"{100 * done // total} %" if total else "-"


def _fetched(record: Record) -> str:
    """The state of a model; of one that is being fetched also how much of it is here."""
    state, percent = plain(record.get("state")), _percent(record)
    return state if percent == "-" else f"{state} {percent}"


def _reason(record: Record) -> str:
    return plain(record["text"]) if record.get("state") == "failed" else ""


NODES: Final = (
    Column("node", get("name")),
    Column("state", get("state"), states=True),
    Column("roles", get("roles")),
    Column("cores", get("cores"), right=True),
    Column("free memory", _memory),
    Column("devices", _devices),
    Column("pid", get("os_pid"), right=True),
    Column("remark", lambda record: plain(record.get("why") or record.get("note"))),
)
INSTANCES: Final = (
    Column("instance", get("id")),
    Column("model", get("model")),
    Column("state", _progress, states=True),
    Column("shape", shape),
    Column("engine", get("engine")),
    Column("epoch", get("epoch"), right=True),
    Column("restarts", get("restarts"), right=True),
    Column("requests", get("active_requests"), right=True),
)
RANKS: Final = (
    Column("instance", get("instance")),
    Column("rank", get("rank"), right=True),
    Column("node", get("node")),
    Column("pid", get("os_pid"), right=True),
    Column("state", get("state"), states=True),
    Column("device", get("device")),
    Column("kernels", get("kernels")),
    Column("layers", lambda r: half_open(r.get("layers"))),
    Column("kv heads", lambda r: half_open(r.get("kv_heads"))),
    Column("heads", lambda r: half_open(r.get("query_heads"))),
    Column("ffn", lambda r: half_open(r.get("ffn"))),
    Column("experts", lambda r: half_open(r.get("experts"))),
    Column("weights", size_of("weights_bytes"), right=True),
    Column("kv cache", size_of("kv_bytes"), right=True),
    Column("memory", size_of("memory_bytes"), right=True),
)
MODELS: Final = (
    Column("model", get("id")),
    Column("state", _fetched, states=True),
    Column("size", size_of("size_bytes"), right=True),
    Column("context", lambda r: plain(r.get("context_tokens") or None), right=True),
    Column("family", get("family")),
    Column("licence", get("license")),
    Column("other names", get("aliases")),
    Column("on", get("node")),
)


PULLS: Final = (
    Column("node", get("node")),
    Column("model", get("model")),
    Column("state", get("phase")),
    Column("from", get("source")),
    Column("done", _percent, right=True),
    Column("size", size_of("total_bytes"), right=True),
)


def table(title: str, columns: Sequence[Column], records: Sequence[Record]) -> RenderableType:
    """One row a record; a line that says so where there is none. Empty columns are left out."""
    if not records:
        return Text(f"{title}: none")
    columns = [c for c in columns if any(c.text(record) not in ("-", "") for record in records)]
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(
            column.heading, justify="right" if column.right else "left", overflow="fold"
        )
    for record in records:
        cells = []
        for column in columns:
            text = column.text(record)
            style = STATE_STYLE.get(text.split(" ")[0], "") if column.states else ""
            cells.append(Text(text, style))
        made.add_row(*cells)
    return made


def records(title: str, rows: Sequence[Record]) -> RenderableType:
    """A table of whatever keys the rows have; ``_bytes`` and ``_s`` get their units."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = []
    for key in keys:
        heading = key.removesuffix("_bytes").replace("_", " ")
        columns.append(Column(heading, size_of(key) if key.endswith("_bytes") else get(key)))
    return table(title, columns, rows)


def status(data: Record) -> RenderableType:
    """The whole of ``ctl status``."""
    leader = plain(data.get("leader"))
    head = Text(f"cluster {plain(data.get('cluster'))}, epoch {plain(data.get('epoch'))}, ")
    head.append(f"leader {leader}\nasked: {plain(data.get('node'))}\n")
    shown = [head, nodes(data["nodes"]), Text(), instances(data["instances"])]
    if pulls := data.get("pulls"):
        shown += [Text(), table("Files on their way", PULLS, pulls)]
    return Group(*shown)


def nodes(data: Sequence[Record]) -> RenderableType:
    """``ctl nodes``."""
    return table("Nodes", NODES, data)


def topology(data: Sequence[Record]) -> RenderableType:
    """``ctl topology``: under each machine its measured links."""
    return Text(printable(draw(Topology.from_term(list(data)))))


def models(data: Sequence[Record]) -> RenderableType:
    """``ctl model list``."""
    return table("Models", MODELS, data)


def instances(data: Sequence[Record]) -> RenderableType:
    """``ctl model ps``: instances, their ranks, and why those that failed did."""
    shown: list[RenderableType] = [table("Instances", INSTANCES, data)]
    ranks = [
        {"instance": instance.get("id"), **rank}
        for instance in data
        for rank in instance.get("ranks") or []
    ]
    if ranks:
        shown += [Text(), table("Ranks", RANKS, ranks)]
    for instance in data:
        if instance.get("state") == "failed":
            why = f"{plain(instance.get('id'))} failed: {plain(instance.get('text'))}"
            shown += [Text(), Text(why, "red")]
    return Group(*shown)


def tree(data: Record) -> RenderableType:
    """``ctl tree``: supervisors and workers, restarts beside those that had any."""
    made = Tree(_branch(data))
    pending = [(made, data)]
    while pending:
        parent, record = pending.pop()
        for child in record.get("children") or []:
            pending.append((parent.add(_branch(child)), child))
    return made


def _branch(record: Record) -> Text:
    kind, state = plain(record.get("type")), plain(record.get("state"))
    text = Text(
        plain(record.get("id") or record.get("name")), "bold" if kind == "supervisor" else ""
    )
    if record.get("strategy"):
        text.append(f" {plain(record['strategy'])}", "cyan")
    text.append(f" {plain(record.get('pid'))}", "dim")
    if state not in ("-", "running"):
        text.append(f" {state}", STATE_STYLE.get(state, ""))
    if restarts := record.get("restarts"):
        text.append(f" restarts {plain(restarts)}", "yellow")
    return text


def details(data: object) -> RenderableType:
    """Nested data, a line a value: for answers whose fields differ from case to case."""
    made = Tree("", hide_root=True)
    _add_details(made, data)
    return made


def _add_details(parent: Tree, data: object) -> None:
    items: Sequence[tuple[str, object]]
    if isinstance(data, Mapping):
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list):
        items = [("", value) for value in data]
    else:
        items = [("", data)]
    for key, value in items:
        shown = printable(key.replace("_bytes", "").replace("_", " "))
        nested = isinstance(value, Mapping) or (
            isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value)
        )
        if nested and value:
            _add_details(parent.add(Text(shown or "-", "bold")), value)
        else:
            text = size(value) if key.endswith("_bytes") else plain(value)
            parent.add(Text(f"{shown}: {text}" if shown else text))
