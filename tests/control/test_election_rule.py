"""The rule of elections, step by step; what comes of it under fire is in ``tests/sim``."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import etf
from control.election_messages import (
    Ack,
    BadMessage,
    Claim,
    Grant,
    Lead,
    Message,
    Nack,
    Refuse,
    Resign,
    Status,
    Tell,
    message_of,
    message_term,
)
from control.election_rule import begin, rank, step
from control.election_state import (
    Action,
    Changed,
    Event,
    Heard,
    Leave,
    NodeDown,
    NodeUp,
    Promise,
    Save,
    Send,
    State,
    Tick,
    authority,
    fence,
    initial,
    why_none,
)
from control.quorum import Roster, alone, configured

THREE = configured(["a", "b", "c"])


def start(
    node: str, roster: Roster, *, candidate: bool = True, promise: Promise | None = None
) -> tuple[State, tuple[Action, ...]]:
    made = initial(
        node, candidate=candidate, roster=roster, promise=promise or Promise(), now_s=0.0
    )
    return begin(made, 0.0)


def told(actions: Iterable[Action], kind: type[Message]) -> list[Send]:
    return [a for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


class Cluster:
    """Machines whose messages arrive at once and in order, all with one clock."""

    def __init__(self, roster: Roster, names: str, **extra: Promise) -> None:
        self.now_s = 0.0
        self.states = {n: start(n, roster, promise=extra.get(n))[0] for n in names}
        self.gone: set[str] = set()
        for i, n in enumerate(names):
            for other in names[:i]:
                self.do(n, NodeUp(other))
                self.do(other, NodeUp(n))

    def do(self, node: str, event: Event) -> None:
        if node in self.gone:
            return
        self.states[node], actions = step(self.states[node], event, self.now_s)
        for action in actions:
            if isinstance(action, Send):
                for to in action.to:
                    self.do(to, Heard(node, action.message))

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.now_s += 0.25
            for node in self.states:
                self.do(node, Tick())

    def lose(self, node: str) -> None:
        self.gone.add(node)
        for other in self.states:
            self.do(other, NodeDown(node))

    def sure(self) -> list[str]:
        return [
            n for n, s in self.states.items() if n not in self.gone and authority(s, self.now_s)
        ]


def test_a_machine_alone_has_elected_itself_when_it_has_started() -> None:
    state, actions = start("a", alone("a", "1"))
    assert actions == (
        Save(Promise(1, "a"), alone("a", "1")),
        Save(Promise(1, "a"), state.roster),
        Changed("a", 1, True),
    )
    assert authority(state, 1e9) is not None  # nobody else can ever agree to another


def test_the_epoch_grows_with_every_won_election() -> None:
    state, _ = start("a", alone("a", "1"), promise=Promise(41, "a"))
    assert (state.leading, state.promise) == (42, Promise(42, "a"))


def test_without_the_coordinator_role_nobody_leads() -> None:
    state, _ = start("a", alone("a", "1"), candidate=False)
    assert (state.leader, state.head, state.seniority) == ("", "", -1)
    assert authority(state, 0.0) is None


def test_a_machine_of_three_alone_is_head_of_its_side_without_authority() -> None:
    state, _ = start("a", THREE)
    assert (state.head, state.leader, authority(state, 0.0)) == ("a", "", None)
    assert "1 of 3 machines are here, 2 are needed; missing: b, c" in why_none(state, 0.0)


def status(clock: int, seniority: int, commands: int) -> Status:
    return Status(clock, seniority, commands, 0, "l", True, True, False)


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        (("z", status(1, 9, 9)), ("a", status(2, 0, 0))),  # clock first
        (("z", status(2, 0, 9)), ("a", status(2, 1, 0))),  # then seniority
        (("z", status(2, 1, 0)), ("a", status(2, 1, 1))),  # then commands seen
        (("a", status(2, 1, 1)), ("z", status(2, 1, 1))),  # then the node id
        (("z", status(2, -1, 9)), ("a", status(2, 0, 0))),  # no coordinator
    ],
)
def test_the_order_of_candidates(lower: tuple[str, Status], higher: tuple[str, Status]) -> None:
    assert rank(*lower) < rank(*higher)


def test_the_round_ends_when_all_have_answered() -> None:
    cluster = Cluster(THREE, "abc")
    assert cluster.sure() == ["b"]  # the first two that met were a quorum
    assert {s.leader for s in cluster.states.values()} == {"b"}
    assert cluster.states["b"].seniority >= 2


def test_the_round_ends_after_three_seconds_and_messages_are_sent_again() -> None:
    state, _ = start("b", THREE)
    state, _ = step(state, NodeUp("a"), 1.0)
    state, _ = step(state, NodeUp("c"), 1.0)
    free = Status(1, 0, 0, 0, THREE.lineage, True, True, False)
    state, actions = step(state, Heard("a", free), 1.1)
    assert not told(actions, Claim)  # c has not answered
    state, actions = step(state, Tick(), 2.9)
    assert not actions
    state, actions = step(state, Tick(), 3.0)
    assert [s.message for s in told(actions, Status)] == [free._replace(ask=True)]
    assert [s.message.epoch for s in told(actions, Claim) if isinstance(s.message, Claim)] == [1]


def test_a_new_leader_within_four_seconds_without_disturbing_a_majority() -> None:
    cluster = Cluster(THREE, "abc")
    cluster.wait(2)
    cluster.lose("b")
    cluster.wait(3.5)
    assert cluster.sure() == ["c"]
    assert cluster.states["a"].promise == Promise(2, "c")


def test_a_join_or_a_leave_does_not_disturb_the_leader() -> None:
    cluster = Cluster(THREE, "abc")
    before = cluster.states["b"]
    cluster.lose("c")
    cluster.wait(5)
    assert cluster.sure() == ["b"]
    cluster.gone.clear()
    cluster.states["c"] = start("c", THREE, promise=cluster.states["c"].promise)[0]
    for node in "ab":
        cluster.do(node, NodeUp("c"))
        cluster.do("c", NodeUp(node))
    cluster.wait(5)
    assert cluster.sure() == ["b"]
    assert {s.promise for s in cluster.states.values()} == {before.promise}


def test_no_authority_without_a_majority() -> None:
    cluster = Cluster(THREE, "abc")
    cluster.lose("a")
    cluster.lose("c")
    cluster.wait(2)
    assert cluster.sure() == ["b"]  # for as long as the others are bound
    cluster.wait(1)
    assert cluster.sure() == []


def test_of_two_the_tie_breaker_goes_on_alone() -> None:
    for lost, sure in (("a", []), ("b", ["a"])):
        cluster = Cluster(configured(["a", "b"], "a"), "ab")
        cluster.wait(1)
        cluster.lose(lost)
        cluster.wait(5)
        assert cluster.sure() == sure


def test_who_leaves_in_good_order_is_replaced_at_once() -> None:
    cluster = Cluster(THREE, "abc")
    cluster.do("b", Leave())
    cluster.lose("b")
    assert cluster.sure() == ["c"]


def test_two_clusters_that_meet_keep_one_leader_by_the_rule() -> None:
    states = {n: start(n, alone(n, "1"))[0] for n in "ab"}
    cluster = Cluster(THREE, "")
    cluster.states = states
    cluster.do("a", NodeUp("b"))
    cluster.do("b", NodeUp("a"))
    for s in states.values():
        s.gated = False
    cluster.wait(3)
    assert cluster.sure() == ["b"]
    assert cluster.states["a"].leader == "b"
    assert {s.roster.members for s in cluster.states.values()} == {("a", "b")}
    assert {s.roster.tie_breaker for s in cluster.states.values()} == {"b"}


def test_an_epoch_is_given_to_one_owner_and_only_by_the_free() -> None:
    state, _ = start("a", THREE)
    ask = Claim(5, 9, 0, 0, THREE.lineage, (0, 0))
    state, actions = step(state, Heard("c", ask), 1.0)
    assert Save(Promise(5, "c"), THREE) in actions
    assert told(actions, Grant)
    state, actions = step(state, Heard("b", ask), 1.0)
    assert told(actions, Refuse)
    sign = Lead(5, 77.0, 9, 1, 0, THREE.lineage, (0, 0), True)
    state, actions = step(state, Heard("c", sign), 1.5)
    assert told(actions, Ack) == [Send(("c",), Ack(5, 77.0, THREE.lineage, (0, 0)))]
    state, actions = step(state, Heard("b", ask._replace(epoch=6)), 4.0)
    assert told(actions, Refuse)  # bound to c
    state, actions = step(state, Heard("b", ask._replace(epoch=6)), 4.6)
    assert told(actions, Grant)
    state, actions = step(state, Heard("c", sign), 4.7)
    assert told(actions, Nack) == [Send(("c",), Nack(6, 5))]


def test_who_is_bound_does_not_vote_for_itself() -> None:
    """Though a quorum of others is free: the leader counts on this node until then."""
    five = configured(["a", "b", "c", "d", "e"])
    state, _ = start("e", five)
    sign = Lead(1, 7.0, 3, 1, 0, five.lineage, (0, 0), True)
    events: list[Event] = [*map(NodeUp, "abcd"), Heard("a", sign), NodeDown("a")]
    for event in events:
        state, _ = step(state, event, 0.1)
    free = Status(state.clock, 0, 0, 1, five.lineage, True, True, False)
    claims = []
    for now_s in (0.2, 1.0, 3.0, 3.2):
        for node in "bcd":
            state, actions = step(state, Heard(node, free), now_s)
            claims += told(actions, Claim)
        state, actions = step(state, Tick(), now_s)
        claims += told(actions, Claim)
        assert bool(claims) is (now_s > 3.1)


def test_who_starts_again_is_still_bound() -> None:
    state, _ = start("a", THREE, promise=Promise(5, "c"))
    ask = Claim(6, 9, 0, 0, THREE.lineage, (0, 0))
    _, actions = step(state, Heard("b", ask), 2.9)
    assert told(actions, Refuse)
    _, actions = step(state, Heard("c", ask), 2.9)
    assert told(actions, Grant)
    _, actions = step(state, Heard("b", ask), 3.1)
    assert told(actions, Grant)


@pytest.mark.parametrize(("newest", "epoch", "obeyed"), [(3, 2, False), (3, 3, True), (3, 4, True)])
def test_the_fence(newest: int, epoch: int, obeyed: bool) -> None:
    assert fence(newest, epoch) is obeyed


numbers = st.integers(-1, 2**60)
texts = st.text("abc@.#:", max_size=20)
stamps = st.tuples(numbers, numbers)
seconds = st.floats(allow_nan=False, allow_infinity=False)
statuses = st.builds(
    Status, numbers, numbers, numbers, numbers, texts, st.booleans(), st.booleans(), st.booleans()
)
known_rosters = st.sampled_from([THREE, alone("a", "1")])
messages = st.one_of(
    statuses,
    st.builds(Claim, numbers, numbers, numbers, numbers, texts, stamps),
    st.builds(Grant, numbers, st.none() | known_rosters),
    st.builds(Refuse, numbers, statuses),
    st.builds(Lead, numbers, seconds, numbers, numbers, numbers, texts, stamps, st.booleans()),
    st.builds(Ack, numbers, seconds, texts, stamps),
    st.builds(Nack, numbers, numbers),
    st.builds(Tell, numbers, seconds, known_rosters),
    st.builds(Resign, numbers),
)


@pytest.mark.slow
@given(messages)
def test_messages_are_plain_terms(message: Message) -> None:
    assert message_of(etf.decode(etf.encode(message_term(message)))) == message


@pytest.mark.slow
@given(messages, st.data())
def test_what_is_no_message_is_refused(message: Message, data: st.DataObject) -> None:
    term = message_term(message)
    assert isinstance(term, tuple)
    with pytest.raises(BadMessage):
        message_of(term[: data.draw(st.integers(0, len(term) - 1))])
    with pytest.raises(BadMessage):
        message_of((*term[:-1], {}))


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from("abcd"), messages), max_size=12))
def test_no_message_crashes_a_node_or_takes_a_promise_back(
    heard: list[tuple[str, Message]],
) -> None:
    state, _ = start("b", THREE)
    for n, (sender, message) in enumerate(heard):
        before = state.promise
        state, _ = step(state, Heard(sender, message), n / 10)
        assert state.promise.epoch >= before.epoch
        state, _ = step(state, Tick(), n / 10)
