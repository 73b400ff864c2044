"""What ``ctl`` asks of ``cluster``: another node fetches, and everybody sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import filelock
import pytest

from bridge import gen_server
from bridge.term import Atom, Term
from bridge.text import text_of
from control.cluster import Cluster
from control.cluster_api import ClusterApi
from tests.control.peer_files.stores import big_gguf, give, store_nodes

REF = "/nowhere/m.gguf"


@pytest.mark.slow
def test_pull_to_another_node_and_its_progress(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_nodes(tmp_path, "a", "b") as (a, b):
            give(a, REF, big_gguf(tmp_path / "m.gguf", ffn=256))
            api = ClusterApi(a.node, "lab")
            await gen_server.start(a.node, Cluster(api, stop=lambda now: None), name="cluster")

            async def ask(*request: Term) -> Any:
                term: Any = (Atom(str(request[0])), *request[1:])
                return await gen_server.node_call(a.node, Atom("cluster"), term, timeout_s=10)

            lock = filelock.FileLock(b.store.shelf.lock_file(REF))
            with lock:  # as if another process were at it
                assert await ask("pull", REF, "b") == "ok"
                rows: list[Any] = []
                while not rows:
                    rows = await api.pulls()
                (row,) = rows
                assert (row["node"], row["phase"]) == (b.name, "waiting")
                assert text_of(row["model"]) == REF
            while (found := await ask("pull_progress", REF, b.name))[1]["phase"] != "done":
                assert found[0] == "ok"
            assert await api.pulls() == []
            assert (await ask("pull_progress", REF))[1]["phase"] == "done"
            for name in ("nobody", "127.0.0.1"):
                error, kind, text = await ask("pull", REF, name)
                assert (error, kind) == ("error", "unknown_node")
                assert "up are a@127.0.0.1, b@127.0.0.1" in text_of(text)

    asyncio.run(main())
