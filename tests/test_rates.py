"""Rates hold in every minute, for all who use an endpoint, and waste no more than they must."""

from __future__ import annotations

import math
import threading

from hypothesis import given
from hypothesis import strategies as st

from online_dpo.paid.rates import Endpoint, Rates, Taken, endpoint_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def rates(endpoint: Endpoint, requests: int | None = None, tokens: int | None = None) -> Rates:
    return Rates(endpoint, requests_per_minute=requests, tokens_per_minute=tokens)


def send(judge: Rates, clock: Clock, tokens: int = 1) -> Taken:
    """Wait as long as it takes, as a door does."""
    while not isinstance(taken := judge.take(tokens), Taken):
        clock.now += taken
    return taken


def most_in_a_minute(sent: list[tuple[float, int]]) -> int:
    starts = [time for time, _ in sent]
    return max(sum(n for time, n in sent if s <= time < s + 60.0 - 1e-6) for s in starts)


@given(st.integers(1, 5000), st.lists(st.floats(0, 3), min_size=1, max_size=200))
def test_no_minute_has_more_requests_than_the_limit(limit: int, gaps: list[float]) -> None:
    clock = Clock()
    judge, sent = rates(Endpoint(clock), limit), []
    for gap in gaps:
        clock.now += gap if limit < 1000 else gap / 1000
        send(judge, clock)
        sent.append((clock.now, 1))
    assert most_in_a_minute(sent) <= limit


CALLS = st.tuples(st.floats(0, 20), st.integers(1, 1000), st.floats(0, 1))


@given(st.integers(1000, 6000), st.lists(CALLS, min_size=1, max_size=80))
def test_no_minute_has_more_tokens_than_the_limit(
    limit: int, calls: list[tuple[float, int, float]]
) -> None:
    """Each is taken at its most, and settled at less before the next one comes, or not at all."""
    clock = Clock()
    judge, sent = rates(Endpoint(clock), tokens=limit), []
    for gap, tokens, share in calls:
        clock.now += gap
        taken = send(judge, clock, tokens)
        used = math.ceil(tokens * share)
        if share < 0.5:
            judge.settle(taken, used)
        sent.append((clock.now, used if share < 0.5 else tokens))
    assert most_in_a_minute(sent) <= limit


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_judges_at_one_endpoint_share_its_minute(turns: list[bool]) -> None:
    clock, sent = Clock(), []
    endpoint = Endpoint(clock)
    judges = (rates(endpoint, 30), rates(endpoint, 30))
    for second in turns:
        send(judges[second], clock)
        sent.append((clock.now, 1))
    assert most_in_a_minute(sent) <= 30


def test_a_judge_without_a_limit_counts_for_one_with_it() -> None:
    clock = Clock()
    endpoint = Endpoint(clock)
    free, bound = rates(endpoint), rates(endpoint, 10)
    for _ in range(100):
        assert isinstance(free.take(1), Taken)
    wait_s = bound.take(1)
    assert not isinstance(wait_s, Taken) and 59.9 < wait_s <= 60.0


def test_a_busy_judge_uses_nearly_all_of_its_rate() -> None:
    clock = Clock()
    judge = rates(Endpoint(clock), 600)
    for _ in range(10):
        send(judge, clock)
    assert clock.now == 0.0
    for _ in range(5990):
        send(judge, clock)
    assert 595 <= clock.now <= 620  # 6000 requests at 600 a minute


def test_tokens_that_were_not_used_come_back() -> None:
    clock = Clock()
    judge = rates(Endpoint(clock), tokens=6000)  # a bucket of 100
    taken = send(judge, clock, 1000)
    wait_s = judge.take(50)
    assert not isinstance(wait_s, Taken) and 9.4 <= wait_s <= 9.6
    judge.settle(taken, 10)
    assert isinstance(judge.take(50), Taken)


def test_what_never_fits_is_said() -> None:
    assert rates(Endpoint(Clock()), tokens=100).take(101) == math.inf


def test_without_a_limit_nobody_waits() -> None:
    judge = rates(Endpoint(Clock()))
    assert all(isinstance(judge.take(10**6), Taken) for _ in range(1000))


def test_an_endpoint_is_an_address_and_a_key() -> None:
    one = endpoint_of("http://rates.test/v1", "k")
    assert endpoint_of("http://rates.test/v1/", "k") is one
    assert endpoint_of("http://rates.test/v1", "other") is not one
    assert endpoint_of("http://other.test/v1", "k") is not one


def test_threads_do_not_take_more_than_there_is() -> None:
    endpoint = Endpoint(Clock())
    judges = [rates(endpoint, 6000) for _ in range(4)]  # a bucket of 100 each
    taken: list[Taken] = []

    def work(judge: Rates) -> None:
        while isinstance(got := judge.take(1), Taken):
            taken.append(got)

    threads = [threading.Thread(target=work, args=(judge,)) for judge in judges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 400
