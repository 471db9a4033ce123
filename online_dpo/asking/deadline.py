"""A time limit on a judge's own time, standing still while a paid call is under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import TracebackType


class Deadline:
    """Raises TimeoutError in the block that it guards, once that has run for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds
        self._timeout = asyncio.timeout(None)
        self._calls = 0

    async def __aenter__(self) -> Deadline:
        await self._timeout.__aenter__()
        self._run()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._timeout.__aexit__(kind, error, trace)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock; calls may overlap."""
        loop = asyncio.get_running_loop()
        self._calls += 1
        if self._calls == 1:
            self._left_s = max(0.0, (self._timeout.when() or loop.time()) - loop.time())
            self._timeout.reschedule(None)
        try:
            yield
        finally:
            self._calls -= 1
            if self._calls == 0 and not self._timeout.expired():
                self._run()

    def _run(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time() + self._left_s)
