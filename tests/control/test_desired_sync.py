"""The desired state on every node; the whole of it under fire is in ``tests/sim``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bridge import etf
from control.desired_sync import (
    Action,
    Adopted,
    Committed,
    Disk,
    Document,
    Event,
    Failed,
    Follows,
    Have,
    Heard,
    Leads,
    Message,
    NodeDown,
    NodeUp,
    Put,
    Read,
    Ready,
    Refused,
    Safe,
    Save,
    Send,
    State,
    Stored,
    Tick,
    Write,
    message_of,
    message_term,
    step,
)
from control.quorum import configured

THREE = configured(["a", "b", "c"])


def run(state: State, *events: Event) -> tuple[State, list[Action]]:
    done: list[Action] = []
    for event in events:
        state, actions = step(state, event)
        done.extend(actions)
    return state, done


def leader(*more: Event) -> tuple[State, list[Action]]:
    return run(State("a"), NodeUp("b"), NodeUp("c"), Leads(3, THREE), *more)


def test_a_new_leader_takes_the_newest_document_of_a_quorum() -> None:
    state, actions = leader()
    assert next(a for a in actions if isinstance(a, Send)).message == Read(3)
    old = Document((2, 8), b"what was committed")
    state, actions = run(state, Heard("c", Have(3, old)))
    again = Document((3, 8), b"what was committed")
    assert actions[:2] == [Save(Disk(3, again)), Adopted(again)]
    assert isinstance(actions[2], Send)
    assert actions[2].message == Put(3, again)
    state, actions = run(state, Heard("b", Stored(3, (3, 8))))
    assert actions == [Safe(THREE.stamp), Ready(again)]


def ready() -> State:
    return leader(Heard("c", Have(3, Document())), Heard("c", Stored(3, (3, 0))))[0]


def test_a_write_is_committed_by_a_quorum_and_the_second_of_two_fails() -> None:
    state, actions = run(ready(), Write((3, 0), b"one", 1), Write((3, 0), b"two", 2))
    one = Document((3, 1), b"one")
    assert [a.message for a in actions if isinstance(a, Send)] == [Put(3, one)]
    state, actions = run(state, Heard("b", Stored(3, (3, 0))))
    assert actions == []  # an answer to something older
    state, actions = run(state, Heard("b", Stored(3, (3, 1))))
    assert actions == [Committed(one, 1), Failed(2)]
    assert state.disk.document == one


def test_what_was_not_answered_is_sent_again_and_then_there_is_silence() -> None:
    state, actions = run(ready(), Tick())
    assert [a.to for a in actions if isinstance(a, Send)] == [("b",)]
    state, actions = run(state, Heard("b", Stored(3, (3, 0))), Tick(), Tick())
    assert actions == []
    state, actions = run(state, NodeDown("b"), NodeUp("b"))  # it may have missed anything
    assert actions == [Send(("b",), Put(3, Document((3, 0), ())))]


@pytest.mark.parametrize("end", [Follows(), Heard("b", Refused(3, 4)), Heard("b", Read(4))])
def test_who_leads_no_more_says_so_to_all_that_wait(end: Event) -> None:
    state, _ = run(ready(), Write((3, 0), b"one", 1), Write((3, 0), b"two", 2))
    state, actions = run(state, end)
    assert [a for a in actions if isinstance(a, Failed)] == [Failed(1), Failed(2)]
    assert run(state, Write((3, 1), b"", 3))[1] == [Failed(3)]


def test_nobody_obeys_an_older_leader() -> None:
    state, _ = run(State("b"), Heard("a", Read(5)))
    assert state.disk.fence == 5
    old: Sequence[Message] = (Read(4), Put(4, Document((4, 9), b"")))
    for message in old:
        assert run(state, Heard("c", message)) == (state, [Send(("c",), Refused(4, 5))])
    late = Document((5, 2), b"newer")
    state, _ = run(state, Heard("a", Put(5, late)), Heard("a", Put(5, Document((5, 1), b"old"))))
    assert state.disk.document == late


@pytest.mark.parametrize(
    "message",
    [
        Read(3),
        Have(3, Document((1, 2), {b"a": [1, 2, 300]})),
        Put(3, Document()),
        Stored(3, (1, 2)),
        Refused(3, 4),
    ],
)
def test_messages_are_plain_terms(message: Message) -> None:
    assert message_of(etf.decode(etf.encode(message_term(message)))) == message
    with pytest.raises(ValueError, match="not a message"):
        message_of((*message_term(message), 1))
