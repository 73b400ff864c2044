"""One places at a time, and who waits for whom."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bridge.gen_server import NOREPLY
from bridge.local_node import LocalNode
from bridge.term import Atom
from control.turns import Turns
from tests.control.in_loop import in_loop


class Askers:
    """A process asks under many names and reads what it is answered."""

    def __init__(self) -> None:
        self.me = LocalNode("n@h", creation=1).open_process()
        self.turns = Turns(self.me)
        self.holds: str = ""
        self.told: list[str] = []

    def ask(self, id_: str) -> bool:
        return self.turns.ask(id_, (self.me.pid, self.me.make_ref()), self._tell) is not NOREPLY

    def _tell(self, id_: str) -> Any:
        self.told.append(id_)
        return Atom("ok")


@in_loop
async def test_the_next_is_told_when_the_first_is_done() -> None:
    one = Askers()
    assert one.ask("a")
    assert not one.ask("b")
    assert not one.ask("c")
    one.turns.end("x")
    one.turns.end("b")  # it waits no more
    assert one.told == ["a"]
    one.turns.end("a")
    assert one.told == ["a", "c"]
    one.turns.end("a")  # late word of one that has ended
    assert not one.ask("d")
    one.turns.clear()
    assert one.ask("e")


@given(st.lists(st.tuples(st.sampled_from("ae"), st.sampled_from("123")), max_size=30))
@in_loop
async def test_one_at_a_time_and_nobody_is_forgotten(steps: list[tuple[str, str]]) -> None:
    one, waiting, holder = Askers(), list[str](), ""
    for what, id_ in steps:
        if what == "a" and id_ != holder and id_ not in waiting:
            given_now = one.ask(id_)
            assert given_now == (not holder)
            holder, waiting = (id_, waiting) if given_now else (holder, [*waiting, id_])
        elif what == "e":
            one.turns.end(id_)
            waiting = [other for other in waiting if other != id_]
            if id_ == holder:
                holder = waiting.pop(0) if waiting else ""
        assert (one.told[-1] if holder else "") == holder
        assert bool(holder) or not waiting


@in_loop
async def test_who_waited_for_several_goes_on_with_the_last() -> None:
    turns = Askers().turns
    turns.waiting_for_room = {"big": {"a", "b"}, "other": {"b", "c"}, "a": {"c"}}
    assert turns.left("b") == []
    assert turns.left("a") == ["big"]  # and a itself waits no more
    assert turns.left("c") == ["other"]
    assert turns.waiting_for_room == {}
