"""The cluster as the surfaces use it: one object behind HTTP, ``cluster`` and the shells.

It holds no state of its own but caches: every answer is asked from the process that
owns it, over the same calls that an Erlang shell would use.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.node import Node
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control import events
from control.backend import (
    ClusterEvent,
    DoneEvent,
    GenerateRequest,
    LoadOptions,
    ModelInfo,
    OpenModel,
    PullProgress,
    Readiness,
    TokenEvent,
)
from control.errors import ControlError, NotReady, UnknownModel
from control.find_server import find_server
from control.generation import GenerationLimits, generate
from control.journal import Journal
from control.json_view import to_json
from control.keys import ApiKey, key_of, key_term
from models.checkpoint import open_checkpoint

ASK_S = 5.0
DESCRIBE_S = 3.0
LOAD_S = 60.0
PLACE_S = 25.0
UNLOAD_S = 120.0
SWAP_S = 1800.0
KEY_S = 20.0
PULL_LOOK_S = 0.2
CANARY_S = 10.0
MAX_OPENED = 16  # tokenizers kept
CANARY_FRESH_S = 10.0


class Refused(ControlError):
    """The cluster said no; ``kind`` is the atom it gave."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class ClusterApi:
    """Backend and ClusterControl over the processes of this node.

    Attributes:
        on_recovery: told every pause, in seconds, that a lost rank cost a stream.
        url: base of this node's HTTP endpoint.
    """

    node: Node
    cluster_name: str
    journal: Journal = field(default_factory=Journal)
    limits: GenerationLimits = field(default_factory=GenerationLimits)
    on_recovery: Callable[[float], None] = lambda pause_s: None
    url: Callable[[], str] = lambda: ""
    _opened: dict[tuple[Path, int, int], asyncio.Task[OpenModel]] = field(default_factory=dict)
    _canaries_s: dict[tuple[str, int], float] = field(default_factory=dict)

    # -- models and generations ------------------------------------------------------------

    async def models(self) -> list[ModelInfo]:
        """Catalogue with the state of each model on this cluster."""
        return [
            ModelInfo(
                id=text_of(m["id"]),
                name=text_of(m["name"]),
                family=text_of(m["family"]),
                state=str(m["state"]),  # type: ignore[arg-type]  # one of ModelInfo's states
                size_bytes=int(m["size_bytes"]),
                context_tokens=int(m["context_tokens"]),
                aliases=tuple(text_of(a) for a in m["aliases"]),
            )
            for m in await self.catalogue()
        ]

    async def catalogue(self) -> list[dict[Any, Term]]:
        """The store's list, with ``loading``, ``ready`` or ``failed`` where instances exist."""
        listed = await self._ask("model_store", Atom("list"))
        states: dict[str, Atom] = {}
        for instance in await self.instances():
            model, state = text_of(instance["model"]), instance["state"]
            shown = {"ready": "ready", "failed": "failed"}.get(str(state), "loading")
            if states.get(model) != "ready":
                states[model] = Atom(shown)
        rows = {text_of(m["id"]): dict(m) for m in listed}
        for model, state in states.items():
            row = rows.setdefault(model, _loose_model(model))
            row[Atom("state")] = state
        return list(rows.values())

    async def open_model(self, model: str, *, timeout_s: float) -> OpenModel:
        """Wait for an instance of ``model``; its tokenizer. Raises UnknownModel, NotReady."""
        with self.node.open_process(label=f"open {model}") as me:
            await find_server(me, model, timeout_s=timeout_s)
        match await self._ask("scheduler", (Atom("path"), model)):
            case ("ok", id_, path, int(context_tokens)):
                opened = await self._open(text_of(id_), Path(text_of(path)))
                return replace(opened, id=text_of(id_), context_tokens=context_tokens)
            case ("error", _, text):
                raise NotReady(model, text_of(text))
            case other:
                raise NotReady(model, repr(other))

    async def _open(self, model: str, path: Path) -> OpenModel:
        """Read once for all who ask at the same time, and again when the file is another."""
        found = await asyncio.to_thread(path.stat)
        key = (path, found.st_mtime_ns, found.st_size)
        if key not in self._opened:
            while len(self._opened) >= MAX_OPENED:
                del self._opened[next(iter(self._opened))]
            read = asyncio.to_thread(_read_open_model, model, path)
            self._opened[key] = asyncio.ensure_future(read)
        try:
            return await asyncio.shield(self._opened[key])
        except Exception:
            self._opened.pop(key, None)  # the next one tries again
            raise

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent | DoneEvent]:
        """Stream one generation across as many epochs as it takes."""
        return generate(
            self.node, self.journal, request, limits=self.limits, on_recovery=self.on_recovery
        )

    # -- state -----------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """The map of CONTRACT section 3, as JSON data."""
        found: dict[str, Any] = to_json(await self.status_term())
        return found

    async def status_term(self) -> dict[Any, Term]:
        """The map of CONTRACT section 3."""
        leader = await self._ask("election", Atom("leader"))
        return {
            Atom("cluster"): self.cluster_name,
            Atom("node"): self.node.name,
            Atom("leader"): leader[1] if leader[0] == "ok" else Atom("undefined"),
            Atom("epoch"): await self._ask("election", Atom("epoch")),
            Atom("nodes"): await self._ask("membership", Atom("nodes")),
            Atom("instances"): await self.instances(),
            Atom("pulls"): await self.pulls(),
            Atom("url"): self.url(),
        }

    async def pulls(self) -> list[dict[Any, Term]]:
        """Files that are being fetched, on any node that says so in time."""

        async def of(name: Atom) -> list[dict[Any, Term]]:
            dest = (Atom("model_store"), name)
            try:
                found: Any = await gen_server.node_call(
                    self.node, dest, Atom("fetches"), timeout_s=DESCRIBE_S
                )
            except gen_server.CallError:
                return []
            if not isinstance(found, list):  # a node of another kind, or of an older version
                return []
            return [{Atom("node"): name, **row} for row in found]

        nodes = (self.node.name, *self.node.nodes())
        return [row for rows in await asyncio.gather(*map(of, nodes)) for row in rows]

    async def instances(self) -> list[dict[Any, Term]]:
        """Every instance, as its coordinator describes it, or as the books know it."""
        rows = await self._ask("scheduler", Atom("instances"))
        return list(await asyncio.gather(*(self._instance(pid, known) for pid, known in rows)))

    async def _instance(self, pid: Term, known: dict[Any, Term]) -> dict[Any, Term]:
        if isinstance(pid, Pid) and known["state"] != "failed":
            try:
                found = await gen_server.node_call(
                    self.node, pid, Atom("describe"), timeout_s=DESCRIBE_S
                )
                return {**known, **found}
            except gen_server.CallTimeout:  # busy: what the books say is the best there is
                return known
            except gen_server.CallError:  # it is just being replaced: a new epoch comes
                return {**known, Atom("state"): Atom("recovering")}
        return known

    async def topology(self) -> list[dict[str, Any]]:
        """Measured links between machines, as JSON data."""
        found: list[dict[str, Any]] = to_json(await self.topology_term())
        return found

    async def topology_term(self) -> list[Term]:
        """As ``Topology.to_term``: a map a link; a machine without any has ``from`` alone."""
        found: list[Term] = await self._ask("link_probe", Atom("topology"))
        return found

    async def tree(self) -> dict[str, Any]:
        """The live supervision tree with restart counts."""
        found: dict[str, Any] = to_json(await self.tree_term())
        return found

    async def tree_term(self) -> dict[Any, Term]:
        found: dict[Any, Term] = await self._ask("root_sup", Atom("tree"))
        return found

    def events(self) -> AsyncIterator[ClusterEvent]:
        """Changes from now on."""
        return self._events()

    async def _events(self) -> AsyncIterator[ClusterEvent]:
        async for kind, data in events.subscribe(self.node):
            yield ClusterEvent(kind, to_json(data))

    async def readiness(self) -> Readiness:
        """Whether every ready instance gave a token lately; asks for one where it has not."""
        instances = await self.instances()
        ready = [i for i in instances if i["state"] == "ready"]
        if not ready:
            states = ", ".join(f"{text_of(i['id'])} is {i['state']}" for i in instances)
            return Readiness(False, f"no instance is ready ({states or 'none is loaded'})")
        for instance in ready:
            why = await self._canary(text_of(instance["id"]), int(instance["epoch"]))
            if why:
                return Readiness(False, why)
        return Readiness(True)

    async def _canary(self, instance: str, epoch: int) -> str:
        """Ask ``instance`` for one token, unless it gave one lately; what went wrong, or empty."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._canaries_s.get((instance, epoch), -CANARY_FRESH_S) < CANARY_FRESH_S:
            return ""
        request = GenerateRequest(
            model=instance, prompt_ids=(1,), max_tokens=1, temperature=0.0, request_id="canary"
        )
        try:
            async with asyncio.timeout(CANARY_S), aclosing(self.generate(request)) as stream:  # type: ignore[type-var]
                async for event in stream:
                    if isinstance(event, DoneEvent) and event.reason == "error":
                        return f"{instance}: {event.text}"
        except TimeoutError:
            return f"{instance} gave no token within {CANARY_S:.0f} s"
        self._canaries_s = {k: v for k, v in self._canaries_s.items() if k[0] != instance}
        self._canaries_s[instance, epoch] = now_s
        return ""

    # -- orders ----------------------------------------------------------------------------

    async def place(self, model: str, options: LoadOptions) -> dict[str, Any]:
        """Dry run: what ``load`` would do, as JSON data."""
        found: dict[str, Any] = to_json(await self.place_with(model, _given(options)))
        return found

    async def place_with(self, model: str, options: Mapping[Any, Term]) -> dict[Any, Term]:
        """``place`` with the options of CONTRACT section 2 as a map. Raises ControlError."""
        request = (Atom("place"), model, dict(options))
        found: dict[Any, Term] = _ok(
            await self._ask("scheduler", request, timeout_s=PLACE_S), model
        )
        return found

    async def load(self, model: str, options: LoadOptions) -> str:
        """Load a model; the new instance's id."""
        return await self.load_with(model, _given(options))

    async def load_with(self, model: str, options: Mapping[Any, Term]) -> str:
        """``load`` with the options of CONTRACT section 2 as a map. Raises ControlError."""
        answer = await self._ask(
            "scheduler", (Atom("load"), model, dict(options)), timeout_s=LOAD_S
        )
        return text_of(_ok(answer, model))

    async def unload(self, instance_id: str) -> None:
        """Drain and unload an instance."""
        answer = await self._ask("scheduler", (Atom("unload"), instance_id), timeout_s=UNLOAD_S)
        if answer != "ok":
            _ok(answer, instance_id)

    async def swap(self, old: str, new: str) -> str:
        """Load ``new`` beside ``old``, let it take over the name ``default``, unload ``old``."""
        going = [
            i for i in await self.instances() if old in (text_of(i["model"]), text_of(i["id"]))
        ]
        if not going:
            raise Refused("not_found", f"no instance of {old!r} runs; nothing to swap")
        instance = await self.load_with(new, {})
        with self.node.open_process(label=f"swap {old}") as me:
            await find_server(me, instance, timeout_s=SWAP_S)
        await self._ask("scheduler", (Atom("replace_default"), text_of(going[0]["model"]), new))
        for gone in going:
            try:
                await self.unload(text_of(gone["id"]))
            except Refused as exc:
                if exc.kind != "not_found":  # somebody else unloaded it meanwhile
                    raise
        return instance

    def pull(self, model: str) -> AsyncIterator[PullProgress]:
        """Download a model to this machine."""
        return self._pull(model)

    async def _pull(self, model: str) -> AsyncIterator[PullProgress]:
        answer = await self._ask("model_store", (Atom("pull"), model))
        if answer != "ok":
            _ok(answer, model)
        while True:
            found = _ok(await self._ask("model_store", (Atom("progress"), model)), model)
            yield PullProgress(
                phase=str(found["phase"]),
                source=text_of(found["source"]),
                done_bytes=int(found["done_bytes"]),
                total_bytes=int(found["total_bytes"]),
            )
            if found["phase"] == "done":
                return
            await asyncio.sleep(PULL_LOOK_S)

    async def remove(self, model: str) -> None:
        """Delete a model's files from this machine."""
        names = {model}
        for info in await self.models():
            if model == info.id or model in info.aliases:
                names.add(info.id)
        for instance in await self.instances():
            if text_of(instance["model"]) in names:
                running = text_of(instance["id"])
                raise Refused("in_use", f"instance {running} runs {model}; unload it first")
        answer = await self._ask("model_store", (Atom("remove"), model))
        if answer != "ok":
            _ok(answer, model)

    async def keys(self) -> list[dict[str, Any]]:
        """The API keys of the cluster, without what opens anything."""
        records = await self._ask("scheduler", Atom("keys"))
        return [key_of(record).public(time.time()) for record in records]

    async def keys_term(self) -> list[dict[Any, Term]]:
        """``keys`` as a term."""
        return [{Atom(k): v for k, v in row.items()} for row in await self.keys()]

    async def add_key(self, record: ApiKey) -> None:
        """Make a key valid on every node. Raises Refused."""
        await self._order((Atom("add_key"), key_term(record)), record.id)

    async def revoke_key(self, id: str) -> None:
        """End a key on every node. Raises Refused."""
        await self._order((Atom("revoke_key"), id), id)

    async def _order(self, request: Term, what: str) -> None:
        answer = await self._ask("scheduler", request, timeout_s=KEY_S)
        if answer != "ok":
            _ok(answer, what)

    async def _ask(self, name: str, request: Term, *, timeout_s: float = ASK_S) -> Term:
        return await gen_server.node_call(self.node, Atom(name), request, timeout_s=timeout_s)


def _given(options: LoadOptions) -> dict[Any, Term]:
    """What was said of a shape, under the names that ``load`` and ``place`` know."""
    given = {
        "tensor": options.tensor,
        "pipeline": options.pipeline,
        "shares": list(options.shares) or None,
        "experts": options.experts,
        "engine": options.engine,
        "context": options.context_tokens,
        "slots": options.slots,
        "threads": options.threads,
        "device": options.device,
        "goal": options.goal,
        "replicas": options.replicas,
        "priority": options.priority,
    }
    return {Atom(name): value for name, value in given.items() if value is not None}


def _ok(answer: Term, model: str) -> Term:
    """The value of ``{ok, Value}``; an error answer is raised."""
    match answer:
        case ("ok", value):
            return value
        case ("error", "unknown_model", text):
            raise UnknownModel(model, told=text_of(text))
        case ("error", kind, text):
            raise Refused(str(kind), text_of(text))
        case other:
            raise Refused("internal_error", repr(other))


def _read_open_model(model: str, path: Path) -> OpenModel:
    checkpoint = open_checkpoint(path)
    return OpenModel(
        model, checkpoint.tokenizer(), checkpoint.chat_template, checkpoint.spec.context_length
    )


def _loose_model(model: str) -> dict[Any, Term]:
    """A model without a card: a local path or a hub reference."""
    return {
        Atom("id"): model,
        Atom("name"): model,
        Atom("family"): "",
        Atom("state"): Atom("local"),
        Atom("size_bytes"): 0,
        Atom("context_tokens"): 0,
        Atom("aliases"): [],
    }
