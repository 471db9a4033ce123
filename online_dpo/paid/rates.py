"""A pace: so many requests, or tokens, in a minute at most, spread evenly."""

from __future__ import annotations

import time
from collections.abc import Callable

UNLIMITED = 10**15


class Pace:
    """A bucket that refills evenly and holds a second's worth, or one request.

    In no minute are more than `per_minute` taken one by one. An amount above what the bucket holds
    waits until the bucket would have it, so that a minute has one such call too many at most.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        """None is without limit."""
        self._clock = clock
        per_minute = per_minute or UNLIMITED
        self._size = max(1.0, per_minute / 60)
        # What is full at the start of a minute is not refilled within it a second time.
        self._per_s = (per_minute - self._size + 1) / 60
        self._level = self._size
        self._at = clock()

    def take(self, amount: int = 1) -> float:
        """Take from the bucket; returns the seconds to wait before using it. First come first."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._at) * self._per_s) - amount
        self._at = now
        return max(0.0, -self._level / self._per_s)

    def give_back(self, amount: int) -> None:
        """Put back what was taken and not used."""
        self._level = min(self._size, self._level + amount)
