"""When a silent port is suspected: never because we were late ourselves."""

from __future__ import annotations

import pytest

from control.rank import CHECK_S, RankLimits, is_silent

LIMITS = RankLimits(silence_s=1.5)


@pytest.mark.parametrize(
    ("beat_s", "checked_s", "silent"),
    [
        (9.9, 9.75, False),  # a fresh beat
        (8.6, 9.75, False),  # late, within the limit
        (8.4, 9.75, True),  # too late, and we looked all the time
        (8.4, 10.0 - 2 * CHECK_S, False),  # too late, but so were we: look once more first
        (1.0, 2.0, False),
    ],
)
def test_silence(beat_s: float, checked_s: float, silent: bool) -> None:
    assert is_silent(10.0, beat_s, checked_s, LIMITS) is silent
