"""Models between real nodes: whole, in parts, from several at once, cut off, damaged."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.term import Atom, Term
from control.events import Events
from control.model_store import ModelStore
from control.peer_files.chunks import CHUNK_BYTES
from control.store_room import taken_bytes
from models.checkpoint import open_checkpoint
from models.errors import PartsMissing
from models.mesh import grid, mesh, units_of
from models.needed import check_here, needed_ranges
from tests.control.peer_files.stores import (
    StoreNode,
    big_gguf,
    contents,
    give,
    give_folder,
    split_gguf,
    store_nodes,
)
from tests.models.test_needed import plain

REF = "/nowhere/m.gguf"
Body = Callable[..., Awaitable[None]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 MB: two runs of chunks, the last of them short."""
    return big_gguf(tmp_path_factory.mktemp("model") / "m.gguf")


def with_nodes(folder: Path, names: str, body: Body) -> None:
    async def main() -> None:
        async with store_nodes(folder, *names.split()) as nodes:
            await body(*nodes)

    asyncio.run(main())


def shard(rank: int, *, tensor: int = 1, pipeline: int = 1) -> Term:
    return (
        Atom("shard"),
        {
            Atom("tensor"): tensor,
            Atom("pipeline"): pipeline,
            Atom("shares"): [1.0] * (tensor * pipeline),
            Atom("rank"): rank,
        },
    )


async def located(node: StoreNode, ref: str = REF) -> dict[str, Any]:
    ok, found = await node.ask("locate", ref)
    assert ok == "ok"
    return {str(key): value for key, value in found.items()}


def size_of(file: Path) -> int:
    return file.stat().st_size


def changed(path: str) -> int:
    return Path(path).stat().st_mtime_ns


def read(file: Path) -> bytes:
    return file.read_bytes()


def same(path: str | Path, file: Path) -> bool:
    return Path(path).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_whole_model_comes_from_a_peer_and_goes_on_from_there(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode, c: StoreNode) -> None:
        held = give(a, REF, file)
        assert (await located(b))["path"] == "undefined"
        ok, path = await b.ensure(REF, a)
        assert ok == "ok"
        assert same(path, file)
        found = await located(b)
        size = size_of(file)
        assert (found["whole"], found["path"], found["size_bytes"]) == (True, path, size)
        assert await b.ensure(REF, a) == ("ok", path)
        held.unlink()
        assert (await c.ensure(REF, a))[:2] == ("error", "download_failed")
        ok, path = await c.ensure(REF, a, b)  # a no longer has it: b is enough
        assert same(path, file)

    with_nodes(tmp_path, "a b c", body)


@pytest.mark.slow
def test_a_model_outside_of_the_store_is_shared_under_its_path(file: Path, tmp_path: Path) -> None:
    """Both nodes of this test see the file, so the second is asked for what the first offers."""

    async def body(a: StoreNode, b: StoreNode) -> None:
        ok, offer = await b.ask("offer", str(file), 1, to=a.name)
        assert ok == "ok"
        assert [bytes(name) for name, _ in offer["files"]] == [b"m.gguf"]
        assert (await b.ask("offer", __file__, 1, to=a.name))[:2] == ("error", "not_a_model")
        assert (await b.ask("offer", "/etc/passwd", 1, to=a.name))[:2] == ("error", "not_a_model")
        assert (await b.ask("offer", "no-card", 1, to=a.name))[:2] == ("error", "unknown_model")

    with_nodes(tmp_path, "a b", body)


@pytest.mark.slow
def test_a_header_then_a_shard_then_all_of_it(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode) -> None:
        give(a, REF, file)
        ok, header = await b.ensure(REF, a, part=Atom("header"))
        assert ok == "ok"
        found = await located(b)
        assert (found["whole"], found["path"]) == (False, header)
        assert found["here_bytes"] == CHUNK_BYTES
        assert size_of(Path(header)) == size_of(file)
        assert taken_bytes(Path(header).parent) < 3 * CHUNK_BYTES  # the rest are holes
        opened = open_checkpoint(Path(header))
        assert opened.fingerprint == open_checkpoint(file).fingerprint
        assert opened.tokenizer().encode("ab")
        ((row),) = await b.ask("list")
        assert (row["id"], row["state"]) == (REF, "partial")

        ok, path = await b.ensure(REF, a, part=shard(1, pipeline=2))
        assert (ok, path) == ("ok", header)
        first, second = mesh(
            opened.spec, grid((1.0,), (1.0, 1.0)), units=units_of(opened.spec, opened)
        )
        check_here(opened, second)
        with pytest.raises(PartsMissing):
            check_here(opened, first)
        assert (await located(b))["here_bytes"] < 0.7 * size_of(file)

        ranges: Term = (
            Atom("ranges"),
            {name: [tuple(r) for r in some] for name, some in needed_ranges(opened, first).items()},
        )
        ok, path = await b.ensure(REF, a, part=ranges)
        assert ok == "ok"
        found = await located(b)
        assert (found["whole"], found["path"]) == (True, path)  # both halves are the whole
        assert same(path, file)
        assert same(header, file)  # whoever was told the old path still finds it
        assert await b.ask("remove", REF) == "ok"
        assert (await located(b))["path"] == "undefined"

    with_nodes(tmp_path, "a b", body)


@pytest.mark.slow
def test_peers_with_different_parts_make_a_whole_together(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode, c: StoreNode, d: StoreNode) -> None:
        give(a, REF, file)
        assert (await b.ensure(REF, a, part=shard(0, pipeline=2)))[0] == "ok"
        assert (await c.ensure(REF, a, part=shard(1, pipeline=2)))[0] == "ok"
        assert await a.ask("remove", REF) == "ok"
        ok, path = await d.ensure(REF, b)  # it finds out about c by itself
        assert ok == "ok"
        assert same(path, file)

    with_nodes(tmp_path, "a b c d", body)


@pytest.mark.slow
def test_what_is_here_is_not_fetched_again(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode, d: StoreNode) -> None:
        give(a, REF, file)
        assert (await b.ensure(REF, a, part=shard(0, pipeline=2)))[0] == "ok"
        a.node.disconnect(d.name)
        assert await a.ask("remove", REF) == "ok"
        error, kind, text = await d.ensure(REF, b)
        assert (error, kind) == ("error", "download_failed")
        assert "b@127.0.0.1: has no more of it" in text
        kept = await located(d)
        assert kept["here_bytes"] == (await located(b))["here_bytes"]
        before = changed(kept["path"])
        assert (await d.ensure(REF, b, part=shard(0, pipeline=2))) == ("ok", kept["path"])
        assert changed(kept["path"]) == before
        give(a, REF, file)
        ok, path = await d.ensure(REF, a)
        assert ok == "ok"
        assert same(path, file)

    with_nodes(tmp_path, "a b d", body)


@pytest.mark.slow
def test_machines_that_fetch_at_a_time_give_to_each_other(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode, c: StoreNode) -> None:
        give(a, REF, file)
        for ok, path in await asyncio.gather(b.ensure(REF, a, c), c.ensure(REF, a, b)):
            assert ok == "ok"
            assert same(path, file)

    with_nodes(tmp_path, "a b c", body)


@pytest.mark.slow
def test_a_damaged_chunk_is_refused_and_comes_from_another(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode, c: StoreNode) -> None:
        held = give(a, REF, file)
        assert (await b.ensure(REF, a))[0] == "ok"  # now the digests of a are known
        before = held.stat()
        with held.open("r+b") as damaged:
            damaged.seek(20 * CHUNK_BYTES + 77)
            damaged.write(b"damaged")
        os.utime(held, ns=(before.st_atime_ns, before.st_mtime_ns))
        error, kind, text = await c.ensure(REF, a)
        assert (error, kind) == ("error", "checksum_mismatch")
        assert "a@127.0.0.1" in text
        found = await located(c)
        assert (found["whole"], found["here_bytes"]) == (
            False,
            size_of(file) - CHUNK_BYTES,
        )
        ok, path = await c.ensure(REF, a, b)
        assert ok == "ok"
        assert same(path, file)

    with_nodes(tmp_path, "a b c", body)


@pytest.mark.slow
def test_another_model_of_the_same_name_is_left_out(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode, c: StoreNode) -> None:
        give(a, REF, file)
        other = tmp_path / "m.gguf"
        content = bytearray(read(file))
        content[2 * CHUNK_BYTES] ^= 1  # of one size, and another model
        for at in range(len(content) - 40 * CHUNK_BYTES // 64, len(content), 4096):
            content[at] ^= 1
        other.write_bytes(content)
        give(b, REF, other)
        ok, path = await c.ensure(REF, a, b)
        assert ok == "ok"
        assert same(path, file)

    with_nodes(tmp_path, "a b c", body)


@pytest.mark.slow
def test_a_peer_that_loses_its_file_midway_and_has_it_again(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode) -> None:
        held = give(a, REF, file)
        assert (await b.ensure(REF, a, part=Atom("header")))[0] == "ok"
        content = read(held)
        stamp = held.stat()
        going = asyncio.create_task(b.ensure(REF, a))
        os.truncate(held, 18 * CHUNK_BYTES)
        answer = await going
        if answer[0] == "error":  # it was quick enough to be cut
            assert answer[1] in ("download_failed", "checksum_mismatch")
            held.write_bytes(content)
            os.utime(held, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            answer = await b.ensure(REF, a)
        assert answer[0] == "ok"
        assert same(answer[1], file)

    with_nodes(tmp_path, "a b", body)


@pytest.mark.slow
def test_pull_takes_from_whoever_has_it_and_tells_everybody(file: Path, tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode) -> None:
        give(a, REF, file)
        await gen_server.start(b.node, Events(), name="events")
        with b.node.open_process(label="listener") as me:
            await gen_server.call(me, Atom("events"), (Atom("subscribe"), me.pid))
            assert await b.ask("pull", REF) == "ok"
            told: list[tuple[str, str]] = []
            while "local" not in [state for state, _ in told]:
                _, kind, data = await me.receive(timeout_s=10)
                if kind == "model":
                    assert data["id"] == REF
                    told.append((str(data["state"]), str(data["source"])))
        assert told == [("pulling", "peer a@127.0.0.1"), ("local", "peer a@127.0.0.1")]
        ok, progress = await b.ask("progress", REF)
        assert (ok, progress["phase"]) == ("ok", "done")
        assert progress["done_bytes"] == size_of(file)
        assert await b.ask("pull", "/nowhere/else.gguf") == "ok"
        for _ in range(200):
            answer = await b.ask("progress", "/nowhere/else.gguf")
            if answer[0] == "error":
                break
        assert answer[:2] == ("error", "not_a_model")

    with_nodes(tmp_path, "a b", body)


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    async def body(a: StoreNode, b: StoreNode) -> None:
        for options, why in {
            "no from": ({}, "from => "),
            "from nobody": ({Atom("from"): []}, "from => "),
            "from whom": ({Atom("from"): [1]}, "not nodes"),
            "part": ({Atom("from"): [Atom(a.name)], Atom("part"): 7}, "not a part"),
            "more": ({Atom("from"): [Atom(a.name)], Atom("x"): 7}, "unknown options x"),
            "rank": ({Atom("from"): [Atom(a.name)], Atom("part"): shard(3)}, "of one rank"),
        }.values():
            error, kind, text = await b.ask("ensure", REF, options)
            assert (error, kind) == ("error", "not_a_model")
            assert why in text
        error, kind, text = await b.ensure(REF, a)
        assert (error, kind) == ("error", "download_failed")
        assert "peer a@127.0.0.1" in text
        error, kind, text = await b.ensure(REF, b)
        assert "no other node" in text
        assert (await b.ask("digests", REF, "m.gguf", 0, 1))[:2] == ("error", "not_a_model")

    with_nodes(tmp_path, "a b", body)


@pytest.mark.slow
def test_a_quota_makes_room_by_what_was_used_longest_ago(file: Path, tmp_path: Path) -> None:
    size = size_of(file)

    async def body(a: StoreNode, b: StoreNode) -> None:
        for number in range(4):
            give(a, f"/nowhere/{number}.gguf", file)
        store: ModelStore = b.store
        store.room.quota_bytes = 2 * size + size // 2
        running: set[str] = set()
        store.in_use = lambda: running
        for number in (0, 1):
            assert (await b.ensure(f"/nowhere/{number}.gguf", a))[0] == "ok"
        assert (await b.ensure("/nowhere/0.gguf", a))[0] == "ok"  # used again
        assert (await b.ensure("/nowhere/2.gguf", a))[0] == "ok"
        assert {row["id"] for row in await b.ask("list")} == {"/nowhere/0.gguf", "/nowhere/2.gguf"}
        running |= {"/nowhere/0.gguf", "/nowhere/2.gguf"}
        error, kind, text = await b.ensure("/nowhere/3.gguf", a)
        assert (error, kind) == ("error", "quota_exceeded")
        assert f"{2.5 * size / 1e6:.1f} MB" in text
        running -= {"/nowhere/0.gguf"}
        assert (await b.ensure("/nowhere/3.gguf", a))[0] == "ok"
        here = {str(row["id"]): str(row["state"]) for row in await b.ask("list")}
        assert here == {"/nowhere/2.gguf": "local", "/nowhere/3.gguf": "local"}

    with_nodes(tmp_path, "a b", body)


@pytest.mark.slow
def test_a_folder_comes_with_its_small_files(tmp_path: Path) -> None:
    ref = "/nowhere/folder"
    (made := tmp_path / "made").mkdir()
    plain(made)
    (made / "empty.txt").touch()

    async def body(a: StoreNode, b: StoreNode) -> None:
        give_folder(a, ref, made)
        ok, header = await b.ensure(ref, a, part=Atom("header"))
        assert ok == "ok"
        assert open_checkpoint(Path(header)).spec == open_checkpoint(made).spec
        ok, path = await b.ensure(ref, a)
        assert ok == "ok"
        assert contents(Path(path)) == contents(made) | {"phalanx.json"}
        assert (await located(b, ref))["whole"] is True
        assert open_checkpoint(Path(path)).fingerprint == open_checkpoint(made).fingerprint

    with_nodes(tmp_path, "a b", body)


@pytest.mark.slow
def test_a_split_model_comes_with_all_its_files(tmp_path: Path) -> None:
    (made := tmp_path / "made").mkdir()
    first = split_gguf(made)
    files = sorted(made.iterdir())
    assert len(files) > 1

    async def body(a: StoreNode, b: StoreNode) -> None:
        ref = "/nowhere/split.gguf"
        give_folder(a, ref, made, main=first.name)
        ok, header = await b.ensure(ref, a, part=Atom("header"))
        assert ok == "ok"
        assert open_checkpoint(Path(header)).spec == open_checkpoint(first).spec
        ok, path = await b.ensure(ref, a)
        assert ok == "ok"
        assert Path(path).name == first.name
        assert open_checkpoint(Path(path)).fingerprint == open_checkpoint(first).fingerprint
        assert (await located(b, ref))["size_bytes"] == sum(map(size_of, files))

    with_nodes(tmp_path, "a b", body)
