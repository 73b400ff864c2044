"""A node for ``ctl`` to talk to: a real one on the real wire, whose ``cluster`` has few answers.

``python -m tests.ops.ctl_node HOME NAME EPMD_PORT`` makes the home's cookie and run file, then
prints ``up``. What the tests want to know of it is appended to ``HOME/seen``.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.keys import ApiKey, key_of
from ops.home import RunInfo, open_home

OK, ERROR = Atom("ok"), Atom("error")
STEPS = {"tiny-1": ["pulling", "loading", "ready"], "broken-1": ["loading", "failed"]}


def atoms(data: Any) -> Term:
    """JSON data as the cluster's terms: keys are atoms."""
    if isinstance(data, dict):
        return {Atom(key): atoms(value) for key, value in data.items()}
    if data is None:
        return Atom("undefined")
    return [atoms(item) for item in data] if isinstance(data, list) else data


def instance(id_: str, state: str) -> dict[str, Any]:
    rank = {
        "rank": 0,
        "node": Atom("n@127.0.0.1"),
        "os_pid": 4711,
        "state": Atom(state),
        "device": "cpu:0",
        "layers": [0, 30],
        "kv_heads": [0, 3],
        "query_heads": [0, 9],
        "ffn": [0, 1536],
        "experts": [0, 0],
        "weights_bytes": 97_000_000,
        "kv_bytes": 44_000_000,
        "memory_bytes": 101_000_000,
        "load_done": 50,
        "load_total": 100,
    }
    return {
        "id": id_,
        "model": id_.rpartition("-")[0],
        "state": Atom(state),
        "text": "tensor blk.0 is \x1b[31mcut short" if state == "failed" else "",
        "epoch": 2,
        "strategy": Atom("single"),
        "tensor_size": 1,
        "pipeline_size": 1,
        "engine": "torch",
        "restarts": 1,
        "active_requests": 0,
        "ranks": [rank],
    }


def placement(model: str, *, fits: bool) -> dict[str, Any]:
    rank = {
        "rank": 1,
        "node": Atom("n@127.0.0.1"),
        "device": "cpu:0",
        "kernels": Atom("compiled"),
        "threads": 1,
        "layers": [0, 30],
        "kv_heads": [2, 3],
        "query_heads": [6, 9],
        "ffn": [1024, 1536],
        "vocab": [32768, 49152],
        "experts": [0, 0],
        "weights_bytes": 33_000_000,
        "kv_bytes": 63_000_000,
        "workspace_bytes": 4_000_000,
        "process_bytes": 162_000_000,
        "total_bytes": 262_000_000,
        "limit_bytes": 999_000_000,
    }
    one = {"strategy": Atom("single"), "tensor_size": 1, "pipeline_size": 1, "shares": [1.0]}
    two = {"strategy": Atom("tensor"), "tensor_size": 2, "pipeline_size": 1, "shares": [2.0, 1.0]}
    return {
        "model": model,
        "state": Atom("remote"),
        "assumed": "Q4_1",
        "size_bytes": 98_000_000,
        "context_tokens": 8192,
        "slots": 4,
        "node": Atom("n@127.0.0.1"),
        "limit_bytes": 1_500_000_000,
        "used_bytes": 500_000_000,
        "chosen": {**two, "ranks": [rank], "total_bytes": 600_000_000, "why": ""} if fits else None,
        "rejected": [{**one, "ranks": [], "total_bytes": 0, "why": "needs 800.00 GB"}],
        "why": "" if fits else "cannot place it: rank 0 needs 800.00 GB",
    }


def links() -> list[dict[str, Any]]:
    def link(a: str, b: str) -> dict[str, Any]:
        figures = {"latency_s": 0.0004, "bytes_per_s": 1.1e8}
        return {"from": a, "to": b, "kind": "ethernet", **figures}

    pair = ("m@10.0.0.2", "n@10.0.0.1")
    return [link(*pair), link(*reversed(pair)), {"from": "o@10.0.0.3"}]


class Cluster(GenServer):
    """Answers as CONTRACT section 4 has it, from tables."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self._seen = home / "seen"
        self._left: dict[str, list[str]] = {"lama-1": ["ready"]}
        self._pulls: dict[str, int] = {}
        self._keys: dict[str, ApiKey] = {}
        self.stopped = asyncio.Event()

    def note(self, text: str) -> None:
        with self._seen.open("a") as file:
            file.write(f"{text}\n")

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "status":
                return atoms(
                    {
                        "cluster": "lab",
                        "node": self.me.node.name,
                        "leader": self.me.node.name,
                        "epoch": 3,
                        "nodes": self._nodes(),
                        "instances": [instance("lama-1", "ready")],
                    }
                )
            case "nodes":
                return atoms(self._nodes())
            case "topology":
                return atoms(links())
            case "instances":
                return [atoms(instance(id_, self._step(id_))) for id_ in list(self._left)]
            case "models":
                return [atoms(self._model(name)) for name in ("lama", "far", "gone")]
            case "tree":
                return atoms(self._tree())
            case ("load", model, dict(options)):
                return self._load(text_of(model), options)
            case ("unload", id_):
                self.note(f"unload {text_of(id_)}")
                return OK
            case ("swap", old, new):
                self.note(f"swap {text_of(old)} {text_of(new)}")
                return (OK, "lama-1")
            case ("pull", model):
                self._pulls[text_of(model)] = 0
                return OK
            case ("pull", model, to):
                self.note(f"pull {text_of(model)} to {text_of(to)}")
                self._pulls[text_of(model)] = 0
                return OK
            case ("pull_progress", model, _):
                return (OK, atoms(self._progress(text_of(model))))
            case ("pull_progress", b"gone"):
                return (ERROR, Atom("download_failed"), "no source could be reached")
            case ("pull_progress", model):
                return (OK, atoms(self._progress(text_of(model))))
            case ("place", b"huge", _):
                return (ERROR, Atom("unknown_model"), "no card is called huge")
            case ("place", model, dict(options)):
                return (OK, atoms(placement(text_of(model), fits=Atom("slots") not in options)))
            case ("generate", b"nobody" | b"default" as model, _, _):
                return (ERROR, Atom("unknown_model"), f"unknown model '{model.decode()}'")
            case ("generate", _, prompt, dict(options)):
                ref = self.me.make_ref()
                to = options["stream_to"]
                self.note(f"asked {prompt!r} {len(options)}")
                self.me.spawn(lambda me: self._stream(me, to, ref, prompt))
                return (OK, ref)
            case ("add_key", record):
                key = key_of(record)
                self.note(f"add_key {key.name} {key.scopes} {key.rate_per_minute} {key.hash}")
                self._keys[key.id] = key
                return OK
            case "keys":
                return [atoms(key.public(0)) for key in self._keys.values()]
            case ("revoke_key", id_):
                if self._keys.pop(text_of(id_), None) is None:
                    return (ERROR, Atom("not_found"), f"no key has the id '{text_of(id_)}'")
                return OK
            case ("stop", bool(now)):
                self.note(f"stop {now}")
                self.stopped.set()
                return OK
        return await super().handle_call(request, from_)

    def _step(self, id_: str) -> str:
        left = self._left[id_]
        return left.pop(0) if len(left) > 1 else left[0]

    def _load(self, model: str, options: dict[Any, Term]) -> Term:
        self.note(f"load {model} {sorted((str(k), v) for k, v in options.items())}")
        id_ = f"{model}-1"
        if id_ not in STEPS:
            return (ERROR, Atom("unknown_model"), f"unknown model '{model}'; known: tiny")
        self._left[id_] = list(STEPS[id_])
        return (OK, id_)

    def _nodes(self) -> list[Any]:
        return [
            {
                "name": self.me.node.name,
                "state": Atom("up"),
                "roles": [Atom("compute"), Atom("storage")],
                "memory": {
                    "total_bytes": 8_000_000_000,
                    "available_bytes": 5_000_000_000,
                    "limit_bytes": 0,
                },
                "cores": 2,
                "os_pid": 17,
                "devices": [{"kind": "cpu", "name": "Testchip", "memory_bytes": 0}],
            }
        ]

    def _model(self, name: str) -> dict[str, Any]:
        here = name == "lama" or (name == "far" and self._pulls.get(name, 0) > 1)
        return {
            "id": name,
            "name": name.title(),
            "family": "llama",
            "state": Atom("local" if here else "remote"),
            "size_bytes": 101_000_000,
            "context_tokens": 8192,
            "aliases": ["big-lama"] if name == "lama" else [],
            "license": "Apache-2.0",
        }

    def _progress(self, model: str) -> dict[str, Any]:
        self._pulls[model] = self._pulls.get(model, 0) + 1
        return {
            "phase": Atom("done" if self._pulls[model] > 2 else "downloading"),
            "source": "package index",
            "done_bytes": 50_000_000,
            "total_bytes": 101_000_000,
        }

    def _tree(self) -> dict[str, Any]:
        worker = {
            "id": Atom("election"),
            "pid": self.me.pid,
            "type": Atom("worker"),
            "state": Atom("running"),
            "restarts": 0,
        }
        below = {
            **worker,
            "id": Atom("cluster_sup"),
            "type": Atom("supervisor"),
            "restarts": 4,
            "children": [worker, {**worker, "id": Atom("scheduler"), "state": Atom("restarting")}],
        }
        return {
            "name": Atom("root_sup"),
            "pid": self.me.pid,
            "strategy": Atom("rest_for_one"),
            "type": Atom("supervisor"),
            "children": [below],
        }

    async def _stream(self, me: Process, to: Pid, ref: Term, prompt: Term) -> None:
        def send(what: Term) -> None:
            me.send(to, (Atom("phalanx"), ref, what))

        watch = me.monitor(to)
        usage = {Atom("prompt_tokens"): 2, Atom("completion_tokens"): 3, Atom("total_tokens"): 5}
        match prompt[-1]["content"] if isinstance(prompt, list) else prompt:
            case b"forever":
                send((Atom("token"), 0, "and so on"))
                await me.receive(lambda m: True if m[:2] == ("DOWN", watch) else None)
                self.note("cancelled")
            case b"crash":
                send((Atom("token"), 0, "half"))
                await me.node.stop()
                os._exit(1)
            case b"fail":
                send((Atom("done"), Atom("error"), {**usage, Atom("error"): "the rank is lost"}))
            case _:
                words = [f"heard {len(prompt)} ", "grüß \x1b[2J", "dich"]
                for number, word in enumerate(words):
                    send((Atom("token"), number, word))
                send((Atom("done"), Atom("stop"), usage))


async def serve(root: Path, name: str, epmd_port: int) -> None:
    home = open_home(root)
    node = Node(name, home.cookie())
    await node.start(listen=("127.0.0.1", 0), epmd=Epmd(tcp_port=epmd_port))
    assert node.address is not None
    server = Cluster(root)
    await gen_server.start(node, server, name="cluster")
    home.write_run(RunInfo(node=name, url="", dist_port=node.address[1], epmd_port=epmd_port))
    print("up", flush=True)
    await server.stopped.wait()
    await asyncio.sleep(0)  # the answer is written first
    await node.stop()
    home.remove_run()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
