"""A pace holds in every minute, is fair to who came first, and wastes no more than it must."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from online_dpo.paid.rates import Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 5000), st.lists(st.floats(0, 3), min_size=1, max_size=300))
def test_no_minute_has_more_than_the_limit(per_minute: int, gaps: list[float]) -> None:
    """Requests come at any time, or all at once; each is sent when its wait is over."""
    clock = Clock()
    pace = Pace(per_minute, clock)
    sent = []
    for gap in gaps:
        clock.now += gap if per_minute < 1000 else gap / 1000
        sent.append(clock.now + pace.take())
    for first in range(len(sent)):
        within = [time for time in sent[first:] if time < sent[first] + 60.0 - 1e-6]
        assert len(within) <= per_minute
    assert sent == sorted(sent)


def test_a_busy_pace_uses_nearly_all_of_it() -> None:
    clock = Clock()
    pace = Pace(600, clock)
    waits = [pace.take() for _ in range(6000)]
    assert waits[:10] == [0.0] * 10
    assert 600 <= waits[-1] <= 620  # 6000 requests at 600 a minute


def test_tokens_wait_for_their_amount_and_come_back_unused() -> None:
    clock = Clock()
    pace = Pace(6000, clock)  # holds 100
    assert pace.take(100) == 0.0
    first = pace.take(1000)
    assert 9.9 <= first <= 10.5
    pace.give_back(1000)
    assert pace.take(50) < 1.0


def test_without_a_limit_nobody_waits() -> None:
    pace = Pace(None)
    assert max(pace.take(10**6) for _ in range(1000)) == 0.0
