"""The desired state on several machines whose messages are lost, and whose disks are full."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bridge import etf
from bridge.term import Atom, Term
from control.desired import Desired, Wanted, read_desired
from control.desired_state import DesiredState
from control.desired_sync import Document as Doc
from control.desired_sync import Put, Stamp, message_term
from control.quorum import configured

NODES = ("a", "b", "c")
ROSTER = configured(NODES)


class Net:
    """Machines and what is under way between them; ``lost`` says which messages never come."""

    def __init__(self, folder: Path, nodes: tuple[str, ...] = NODES) -> None:
        self.folder, self.queue = folder, list[tuple[str, str, Term]]()
        self.lost: Callable[[str, str], bool] = lambda a, b: False
        self.leader, self.epoch = "", 0
        self.safe: list[Stamp] = []
        self.ready: list[str] = []
        self.nodes = {name: self.boot(name) for name in nodes}

    def path(self, name: str) -> Path:
        return self.folder / name / "desired.json"

    def boot(self, name: str) -> DesiredState:
        self.path(name).parent.mkdir(exist_ok=True)

        def send(to: Any, term: Term) -> None:
            self.queue.extend((name, other, etf.decode(etf.encode(term))) for other in to)

        state = DesiredState(
            name,
            self.path(name),
            send=send,
            on_ready=partial(self.ready.append, name),
            on_safe=self.safe.append,
            on_keys=lambda: None,
        )
        state.read()
        return state

    def lead(self, leader: str, epoch: int) -> None:
        """Everybody follows it, and all are up."""
        self.leader, self.epoch = leader, epoch
        for name, state in self.nodes.items():
            for other in self.nodes:
                if other != name:
                    state.node_up(other)
            if name == leader:
                state.lead(epoch, ROSTER)
            else:
                state.follow()
        self.settle()

    def settle(self) -> None:
        while self.queue:
            sender, to, term = self.queue.pop(0)
            if not self.lost(sender, to):
                self.nodes[to].hear(sender, term, leader=self.leader, epoch=self.epoch)

    def tick(self) -> None:
        for state in self.nodes.values():
            state.tick()
        self.settle()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_committed_outlives_lost_messages_and_leaders(tmp_path: Path, seed: int) -> None:
    rng, net = Random(seed), Net(tmp_path)
    steps = rng.choices(["save", "save2", "tick", "restart", "elect"], k=10)
    committed: set[str] = set()
    epoch = serial = 0

    def done(id_: str, ok: bool) -> None:
        if ok:
            committed.add(id_)

    for step in ["elect", *steps]:
        net.lost = lambda a, b: rng.random() < 0.3
        match step:
            case "elect":
                epoch += 1
                net.lead(rng.choice(NODES), epoch)
            case "save" | "save2":
                for _ in range(1 + (step == "save2")):
                    serial += 1
                    state = net.nodes[net.leader]
                    wish = state.now.add(Wanted(f"m-{serial}", "m"))
                    state.save(wish, partial(done, f"m-{serial}"))
                net.settle()
            case "tick":
                net.tick()
            case "restart":
                name = rng.choice([n for n in NODES if n != net.leader])
                net.nodes[name] = net.boot(name)
                for other in NODES:
                    if other != name:
                        net.nodes[name].node_up(other)
                        net.nodes[other].node_down(name)
                        net.nodes[other].node_up(name)
                net.settle()
        leader = net.nodes[net.leader]
        if leader.ready:
            assert committed <= {w.id for w in leader.now.wanted}
    net.lost = lambda a, b: False
    epoch += 1
    net.lead(rng.choice(NODES), epoch)
    net.tick()
    assert len({(s.document.stamp, s.now) for s in net.nodes.values()}) == 1
    assert committed <= {w.id for w in net.nodes["a"].now.wanted}
    assert {read_desired(net.path(n)) for n in NODES} == {net.nodes["a"].now}
    assert not any(state.busy for state in net.nodes.values())


def test_a_leader_that_is_none_any_more_says_so_to_all_that_wait(tmp_path: Path) -> None:
    net, told = Net(tmp_path), list[bool]()
    net.nodes["a"].save(Desired(1), told.append)  # it does not lead
    assert told == [False]
    net.lead("a", 1)
    assert net.ready == ["a"]
    assert net.safe
    net.lost = lambda a, b: True
    for n in (1, 2):
        state = net.nodes["a"]
        state.save(state.now.add(Wanted(f"m-{n}", "m")), told.append)
    net.settle()
    assert net.nodes["a"].busy
    assert [w.id for w in net.nodes["a"].now.wanted] == ["m-1", "m-2"]  # as if it were so
    net.nodes["a"].follow()
    assert told == [False, False, False]
    assert not net.nodes["a"].busy
    assert net.nodes["a"].now == read_desired(net.path("a"))


def test_each_change_may_be_made_from_the_one_before(tmp_path: Path) -> None:
    net, told = Net(tmp_path), list[bool]()
    net.lead("a", 1)
    state = net.nodes["a"]
    state.save(state.now.add(Wanted("m-1", "m")), told.append)
    state.save(state.now.add(Wanted("m-2", "m")), told.append)
    state.save(state.now.remove("m-1"), told.append)
    net.settle()
    assert told == [True, True, True]
    for name in NODES:
        assert [w.id for w in read_desired(net.path(name)).wanted] == ["m-2"]
        assert read_desired(net.path(name)).gone == ("m-1",)


def test_a_full_disk_costs_the_file_and_not_the_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a machine alone; it is written when there is room."""
    net, told = Net(tmp_path, ("a",)), list[bool]()
    state = net.nodes["a"]
    state.lead(1, configured(["a"]))
    folder = net.path("a").parent
    folder.rename(tmp_path / "away")
    state.save(state.now.add(Wanted("a-1", "a")), told.append)
    assert [wanted.id for wanted in state.now.wanted] == ["a-1"]
    assert told == [True]
    assert "lost at a restart" in caplog.text
    (tmp_path / "away").rename(folder)
    assert read_desired(net.path("a")).wanted == ()
    state.tick()
    assert read_desired(net.path("a")) == state.now


def test_a_machine_says_nothing_that_is_not_on_its_disk(tmp_path: Path) -> None:
    net, told = Net(tmp_path), list[bool]()
    net.lost = lambda a, b: "c" in (a, b)
    net.lead("a", 1)
    assert net.ready == ["a"]
    net.path("b").parent.rename(tmp_path / "away")
    state = net.nodes["a"]
    state.save(state.now.add(Wanted("m-1", "m")), told.append)
    net.settle()
    assert told == []  # b has it in memory alone
    net.tick()
    assert told == []
    (tmp_path / "away").rename(net.path("b").parent)
    net.tick()  # it is written
    net.tick()  # and said
    assert told == [True]


def test_nonsense_of_a_peer_is_told_once_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net(tmp_path)
    net.lead("a", 1)
    before = net.nodes["b"].document
    put = message_term(Put(1, Doc((1, 5), (b"", [(b"m-1", b"m", b"[]")], []))))
    unknown = message_term(Put(1, Doc((1, 5), (b"", [(b"m-1", b"m", b'{"new": 1}')], []))))
    for term in (put, unknown, 5, (), (Atom("put"),), (Atom("put"), 1, 2), b"x"):
        net.nodes["b"].hear("a", term, leader="a", epoch=1)
    assert net.nodes["b"].document == before
    assert caplog.text.count("a sent") == 1
    # What others than the leader say, or the leader of another epoch, is not heard.
    good = message_term(Put(1, Doc((1, 5), (b"", [], []))))
    net.nodes["b"].hear("c", good, leader="a", epoch=1)
    net.nodes["b"].hear("a", good, leader="a", epoch=2)
    assert net.nodes["b"].document == before
    net.nodes["b"].hear("a", good, leader="a", epoch=1)
    assert net.nodes["b"].document.stamp == (1, 5)
