"""Room in the budget: reserved before a call leaves, waited for while others are in flight."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from online_dpo.errors import BudgetError
from online_dpo.paid.ledger import Ledger
from online_dpo.paid.ledger_rows import Entry, Limits

T = TypeVar("T")


class Reservations:
    """The calls of one event loop that are in flight, and those that wait for room."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._in_flight = 0
        self._num_ended = 0
        self._waiting: list[asyncio.Future[None]] = []

    async def reserve(self, entry: Entry, ledger: Ledger) -> Entry:
        """Note a call as sent; where there is no room, first let what is in flight end for less.

        `end` must follow. Raises BudgetError where nothing is in flight and there is no room.
        """
        while True:
            ended = self._num_ended
            sending = ledger.send(entry, self.limits)
            try:
                sent = await committed(sending)
            except BudgetError:
                if self._num_ended == ended and self._in_flight == 0:
                    raise
            except asyncio.CancelledError:
                sending.add_done_callback(lambda done: _release(ledger, done))
                raise
            else:
                self._in_flight += 1
                return sent
            if self._num_ended == ended:
                self._waiting.append(asyncio.get_running_loop().create_future())
                await self._waiting[-1]

    def resume(self) -> None:
        """Count a call that an earlier process has sent. `end` must follow."""
        self._in_flight += 1

    def end(self) -> None:
        """A call has ended: whoever waits for room may try again."""
        self._in_flight -= 1
        self._num_ended += 1
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()


async def committed(future: Future[T]) -> T:
    """The result of a ledger operation; cancelling the wait does not cancel the operation."""
    return await asyncio.shield(asyncio.wrap_future(future))


def _release(ledger: Ledger, reserved: Future[Entry]) -> None:
    if reserved.exception() is None:
        ledger.fail(reserved.result(), "cancelled before it was sent")
