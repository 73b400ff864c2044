"""Nodes with a model store each, connected over loopback, inside the test's process."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bridge import gen_server
from bridge.node import Node
from bridge.term import Atom, Pid, Term
from control.model_store import ModelStore
from control.model_store_server import ModelStoreServer
from tests.models.tiny import llama_tensors, write_gguf


class StoreNode:
    """Made by ``store_nodes``."""

    def __init__(self, node: Node, store: ModelStore, server: ModelStoreServer) -> None:
        self.node, self.store, self.server = node, store, server

    @property
    def name(self) -> str:
        return str(self.node.name)

    async def ask(self, *request: Any, to: str = "", timeout_s: float = 20) -> Any:
        """Call a ``model_store``, this node's own unless another's name is given."""
        term: Any = (Atom(request[0]), *request[1:]) if len(request) > 1 else Atom(request[0])
        dest = (Atom("model_store"), Atom(to or self.name))
        return await gen_server.node_call(self.node, dest, term, timeout_s=timeout_s)

    async def ensure(self, ref: str, *peers: StoreNode, part: Term = None, **more: Any) -> Any:
        """``{ensure, Ref, #{from => Peers, part => Part}}``."""
        options: dict[Any, Term] = {Atom("from"): [Atom(peer.name) for peer in peers]}
        if part is not None:
            options[Atom("part")] = part
        return await self.ask("ensure", ref, options, **more)


@contextlib.asynccontextmanager
async def store_nodes(
    folder: Path, *names: str, quota_bytes: int | None = None
) -> AsyncIterator[list[StoreNode]]:
    """One node for each name, all connected; their stores are folders of those names."""
    made: list[StoreNode] = []
    async with contextlib.AsyncExitStack() as stack:
        for name in names:
            node = Node(f"{name}@127.0.0.1", "SECRET")
            await node.start(listen=("127.0.0.1", 0), epmd=None)
            stack.push_async_callback(node.stop)
            store = ModelStore(folder / name, {}, quota_bytes=quota_bytes)
            server = ModelStoreServer(store)
            pid = await gen_server.start(node, server, name="model_store")
            stack.push_async_callback(stop_server, node, pid)
            for other in made:
                assert await node.connect(other.name, address=other.node.address)
            made.append(StoreNode(node, store, server))
        yield made


async def stop_server(node: Node, pid: Pid) -> None:
    with node.open_process(label="end") as me:
        ref = me.monitor(pid)
        me.exit(pid, Atom("shutdown"))
        await me.receive(lambda m: m if m[:2] == ("DOWN", ref) else None, timeout_s=5)


def give(node: StoreNode, ref: str, file: Path) -> Path:
    """Put a copy of ``file`` into a node's store, as if it had been fetched; where it is."""
    files = node.store.shelf.root / ".given" / "files"
    files.mkdir(parents=True)
    shutil.copy(file, files / file.name)
    return node.store.shelf.publish(ref, files, "given")


def give_folder(node: StoreNode, ref: str, folder: Path, main: str = "") -> Path:
    """The same of a folder, of which ``main`` is to be opened."""
    files = node.store.shelf.root / ".given" / "files"
    shutil.copytree(folder, files)
    return node.store.shelf.publish(ref, files, "given", main=main)


def contents(folder: Path) -> set[str]:
    """Names of the files of a folder."""
    return {path.name for path in folder.iterdir()}


def split_gguf(folder: Path) -> Path:
    """The first of three files of one tiny model."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=8)
    for key, value in {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    for name, (data, _) in llama_tensors().items():
        writer.add_tensor(name, data.view(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.glob("*.gguf"))


def big_gguf(path: Path, *, ffn: int = 4096, layers: int = 2) -> Path:
    """A model of some megabytes with random weights."""
    tensors = llama_tensors(layers=layers, hidden=256, heads=8, kv_heads=4, ffn=ffn, vocab=128)
    return write_gguf(
        path, tensors, metadata={"attention.head_count": 8, "attention.head_count_kv": 4}
    )
