"""Rates: so many requests and tokens in a minute at an endpoint, spread evenly, whoever sends."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 60.0

_ROUNDING = 1e-9

_ENDPOINTS: dict[str, Endpoint] = {}
_ENDPOINTS_LOCK = threading.Lock()


@dataclass(slots=True, eq=False)
class Taken:
    """An amount, and when it was taken."""

    at: float
    amount: int


class LastMinute:
    """What has been taken in the last minute. Not for several threads without a lock."""

    def __init__(self) -> None:
        self._taken: deque[Taken] = deque()
        self._total = 0

    def add(self, amount: int, now: float) -> Taken:
        taken = Taken(now, amount)
        self._taken.append(taken)
        self._total += amount
        return taken

    def correct(self, taken: Taken, amount: int) -> None:
        """Count `amount` instead; nothing changes where it was taken more than a minute ago."""
        if self._taken and taken.at >= self._taken[0].at:
            self._total += amount - taken.amount
            taken.amount = amount

    def wait_s(self, amount: int, limit: int, now: float) -> float:
        """Seconds until `amount` more stay within a limit, if nothing else is taken meanwhile."""
        while self._taken and self._taken[0].at + WINDOW_S <= now + _ROUNDING:
            self._total -= self._taken.popleft().amount
        excess = self._total + amount - limit
        if excess <= 0:
            return 0.0
        for taken in self._taken:
            excess -= taken.amount
            if excess <= 0:
                return taken.at + WINDOW_S - now
        return math.inf


class Endpoint:
    """What all judges of this process have sent to one endpoint with one key."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.requests = LastMinute()
        self.tokens = LastMinute()


def endpoint_of(base_url: str | None, key: str | None) -> Endpoint:
    """The endpoint at an address, as this process knows it; None is the API's own."""
    place = f"{(base_url or '').rstrip('/')} {key or ''}"
    name = hashlib.sha256(place.encode()).hexdigest()
    with _ENDPOINTS_LOCK:
        return _ENDPOINTS.setdefault(name, Endpoint())


class Pace:
    """A limit on one of the two: no minute has more, of everybody's; one's own are spread evenly.

    The bucket holds a second's worth and refills evenly; an amount above that empties it below
    zero, and the next one waits.
    """

    def __init__(self, per_minute: int | None, record: LastMinute, now: float) -> None:
        """None is without limit."""
        self.per_minute = per_minute
        self._record = record
        self._per_s = math.inf if per_minute is None else per_minute / WINDOW_S
        self._size = max(1.0, self._per_s)
        self._level = self._size
        self._at = now

    def wait_s(self, amount: int, now: float) -> float:
        """Seconds until `amount` may be taken; infinite where it is more than a minute's."""
        if self.per_minute is None:
            return 0.0
        self._level = min(self._size, self._level + (now - self._at) * self._per_s)
        self._at = now
        lacking = min(amount, self._size) - self._level
        of_bucket = lacking / self._per_s if lacking > _ROUNDING else 0.0
        return max(of_bucket, self._record.wait_s(amount, self.per_minute, now))

    def take(self, amount: int, now: float) -> Taken:
        if self.per_minute is not None:
            self._level -= amount
        return self._record.add(amount, now)

    def correct(self, taken: Taken, amount: int) -> None:
        """What was taken has turned out to be `amount`."""
        if self.per_minute is not None:
            self._level = min(self._size, self._level + taken.amount - amount)
        self._record.correct(taken, amount)


class Rates:
    """The rates that one judge keeps to at an endpoint; others' requests there count too.

    A call's tokens are taken before it is sent, at the most that it may use, and corrected when it
    is known what it has used. For any thread.
    """

    def __init__(
        self, endpoint: Endpoint, *, requests_per_minute: int | None, tokens_per_minute: int | None
    ) -> None:
        self._endpoint = endpoint
        now = endpoint.clock()
        self._requests = Pace(requests_per_minute, endpoint.requests, now)
        self._tokens = Pace(tokens_per_minute, endpoint.tokens, now)

    def take(self, tokens: int) -> Taken | float:
        """Take a request of so many tokens, or say in how many seconds to try again.

        Infinite: it has more tokens than a minute.
        """
        with self._endpoint.lock:
            now = self._endpoint.clock()
            wait_s = max(self._requests.wait_s(1, now), self._tokens.wait_s(tokens, now))
            if wait_s > 0.0:
                return wait_s
            self._requests.take(1, now)
            return self._tokens.take(tokens, now)

    def settle(self, taken: Taken, tokens: int) -> None:
        """A request has used so many tokens."""
        with self._endpoint.lock:
            self._tokens.correct(taken, tokens)
