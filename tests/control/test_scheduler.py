"""The scheduler among stand-ins for its neighbours: what is loaded, refused, placed and found."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.term import Atom
from control.books import Books, Record
from control.desired import Wanted, read_desired
from control.load_options import LoadOptions
from tests.control.lab import CARD, Lab, LabMachine, lab, until
from tests.control.specs import spec

A = Atom
N = "n@127.0.0.1"


def run(
    folder: Path,
    body: Callable[[LabMachine, Lab], Awaitable[None]],
    *,
    leader: str = N,
    autoload: bool = False,
    limit_bytes: int = 4 * 10**9,
) -> None:
    """One machine."""

    async def main() -> None:
        async with lab(folder, {N: limit_bytes}, leader=leader, autoload=autoload) as made:
            await asyncio.wait_for(body(made[N], made), 20)

    asyncio.run(main())


def test_a_load_is_placed_before_it_is_answered(tmp_path: Path) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        one.agent.deaf = True
        options = {A("shares"): [2, 1], A("slots"): 2}
        assert await one.ask("load", "tiny", options) == (A("ok"), "tiny-1")
        (row,) = (await one.rows()).values()
        assert (row["strategy"], row["tensor_size"], row["shares"]) == ("tensor", 2, [2.0, 1.0])
        assert (row["state"], row["context_tokens"], row["slots"]) == ("loading", 128, 2)
        (wanted,) = read_desired(one.desired_path).wanted
        assert wanted.options == LoadOptions(shares=(2.0, 1.0), slots=2)

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"tensor": 5, "pipeline": 3}, "illegal_shares", ["4 attention heads", "2 layers"]),
        ({"shares": [1, 2, 3], "tensor": 2}, "bad_option", ["3 numbers"]),
        ({"context": 257}, "bad_option", ["beyond the 256 tokens"]),
        ({"engine": b"mlx"}, "bad_option", ["has no MLX"]),
    ],
)
def test_a_refused_load_leaves_nothing_behind(
    tmp_path: Path, options: dict[str, Any], kind: str, words: list[str]
) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        given = {A(name): value for name, value in options.items()}
        answer = await one.ask("load", "tiny", given)
        assert answer[:2] == (A("error"), A(kind))
        for word in words:
            assert word in answer[2]
        assert await one.rows() == {}
        assert read_desired(one.desired_path).wanted == ()

    run(tmp_path, body)


def test_what_is_unloaded_while_it_comes_up_is_gone(tmp_path: Path) -> None:
    """Word of its helper that was under way must not bring it back."""

    async def body(one: LabMachine, made: Lab) -> None:
        for message in [
            (A("prepared"), "slow-1", spec("slow-1")),
            (A("failed"), "slow-1", A("x"), "x"),
        ]:
            assert await one.ask("load", "slow", {}) == (A("ok"), "slow-1")
            gone = asyncio.ensure_future(one.ask("unload", "slow-1"))
            await asyncio.sleep(0)  # it is in the mailbox
            one.tell(message)
            with one.node.open_process(label="ended") as worker:
                worker.send(A("scheduler"), (A("worker"), worker.pid, message))
                turn = gen_server.call(worker, A("scheduler"), (A("place_turn"), "slow-1"))
                assert (await turn)[0] == "error"
            assert await gone == A("ok")
            assert await one.rows() == {}
        assert read_desired(one.desired_path).wanted == ()

    run(tmp_path, body)


def test_who_waits_for_a_load_hears_that_it_was_unloaded(tmp_path: Path) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        one.membership.stalls = True
        loading = asyncio.ensure_future(one.ask("load", "slow", {}))
        await until(one.rows)
        assert await one.ask("unload", "slow-1") == A("ok")
        assert (await loading)[:2] == (A("error"), A("unloaded"))

    run(tmp_path, body)


def test_place_tells_and_changes_nothing(tmp_path: Path) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        ok, here = await one.ask("place", "tiny", {A("tensor"): 2})
        assert ok == "ok"
        assert (here["state"], here["assumed"], here["node"]) == ("local", "", N)
        assert [rank["kv_heads"] for rank in here["chosen"]["ranks"]] == [[0, 1], [1, 2]]
        assert {str(one["strategy"]) for one in here["rejected"]} >= {"single", "pipeline"}

        ok, far = await one.ask("place", "far", {A("context"): 1024})
        assert (far["state"], far["assumed"]) == ("remote", "BF16")
        assert far["size_bytes"] == CARD.size_bytes
        assert far["chosen"]["ranks"][0]["weights_bytes"] == pytest.approx(CARD.size_bytes, rel=0.1)

        ok, none = await one.ask("place", "far", {A("slots"): 1024})
        assert none["chosen"] == A("undefined")
        assert "lends 4.00 GB" in none["why"]

        answer = await one.ask("place", "hf:org/repo", {})
        assert answer[:2] == (A("error"), A("not_downloaded"))
        assert (await one.ask("place", "nonesuch", {}))[1] == "unknown_model"
        assert await one.rows() == {}

    run(tmp_path, body)


def test_other_instances_take_memory_of_the_machine() -> None:
    books = Books()
    for id_, state, num_bytes in [("a", "ready", 10), ("b", "failed", 100), ("c", "loading", 1)]:
        taken = {("n@h", "memory"): num_bytes}
        books.add(Record(id_, "m", Wanted(id_, "m"), state=state, taken=taken))
    books.add(Record("d", "m", Wanted("d", "m")))
    assert books.used("none") == {("n@h", "memory"): 11}
    assert books.used("a") == {("n@h", "memory"): 1}


def test_an_instance_is_found_by_its_own_name(tmp_path: Path) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        for n in (1, 2):
            assert await one.ask("load", "tiny", {}) == (A("ok"), f"tiny-{n}")
        assert (await one.ask("find", "tiny-2"))[:2] == (A("ok"), "tiny-2")
        each = [(await one.ask("find", "tiny"))[1] for _ in range(4)]
        assert sorted(each) == ["tiny-1", "tiny-1", "tiny-2", "tiny-2"]  # in turn
        assert (await one.ask("find", "nonesuch"))[:2] == (A("error"), A("unknown_model"))

    run(tmp_path, body)


def test_default_is_an_alias_that_is_on_disk(tmp_path: Path) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        assert await one.ask("set_default", "tiny") == A("ok")
        assert await one.ask("load", "tiny", {}) == (A("ok"), "tiny-1")
        assert (await one.ask("find", "default"))[1] == "tiny-1"
        assert await one.ask("replace_default", "slow", "far") == A("ok")  # it is not named
        assert read_desired(one.desired_path).default == "tiny"
        assert await one.ask("replace_default", "tiny", "far") == A("ok")
        assert read_desired(one.desired_path).default == CARD.id

    run(tmp_path, body)


def test_a_header_is_brought_for_what_is_routed(tmp_path: Path) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        assert (await one.ask("path", "tiny"))[:2] == (A("error"), A("not_loaded"))
        await one.ask("load", "tiny", {})
        await one.ask("find", "tiny")
        path = str(made.model)
        assert await one.ask("path", "tiny") == (A("ok"), "tiny", path, 128)

    run(tmp_path, body)


def test_nonsense_is_answered(tmp_path: Path) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        requests: list[Any] = [(A("load"),), (A("load"), 5, {}), [1], ({},), {}, 7, b"x"]
        for request in [*requests, (A("find"), 5)]:
            dest = A("scheduler")
            answer: Any = await gen_server.node_call(one.node, dest, request, timeout_s=5)
            assert answer[0] == "error", request

    run(tmp_path, body)


def test_one_machine_that_nobody_leads_says_so(tmp_path: Path) -> None:
    async def body(one: LabMachine, made: Lab) -> None:
        load = asyncio.ensure_future(one.ask("load", "tiny", {}))
        find = asyncio.ensure_future(one.ask("find", "tiny"))
        assert await one.rows() == {}  # both are waiting by now
        made.clock.now_s += 14
        one.tick()
        assert await one.rows() == {}
        assert not load.done()
        assert not find.done()
        made.clock.now_s += 2
        one.tick()
        for answer in (await load, await find):
            assert answer[:2] == (A("error"), A("no_leader"))

    run(tmp_path, body, leader="")
