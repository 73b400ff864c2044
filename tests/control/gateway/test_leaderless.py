"""An order while the cluster elects a leader is refused for now, not for good."""

from __future__ import annotations

import pytest

from control.cluster_api import Refused
from control.gateway.errors import LEADERLESS, from_exception


@pytest.mark.parametrize("kind", sorted(LEADERLESS))
def test_without_a_leader_an_order_may_be_given_again(kind: str) -> None:
    answer = from_exception(Refused(kind, "nobody leads"))
    assert answer is not None
    assert (answer.status_code, answer.code) == (503, kind)
    assert answer.headers is not None
    assert int(answer.headers["Retry-After"]) > 0
