"""A sampler that outlives its process: a restart, then smaller batches, then the failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from online_dpo.errors import EngineError, WorkerError
from online_dpo.workers import Event, OnEvent, Worker

SHRINKS = (1, 2)
"""By what the batch is divided in the attempts after a failure."""


class RestartingSampler:
    """A `Worker` whose process may exit, hang or raise: it is started anew, its policy loaded.

    `make` starts a sampler whose batches are smaller by a divisor. What a sampler says in the
    campaign's own terms (a canary that fails, a config that cannot be) is no such failure.
    """

    def __init__(self, make: Callable[[int], Worker]) -> None:
        self._make = make
        self._divisor = 1
        self._worker = make(1)
        self._policy: dict[str, Any] | None = None

    def call(self, method: str, *, on_event: OnEvent | None = None, **params: Any) -> Event:
        """Run a method, in a fresh process where this one fails. Raises EngineError in the end."""
        try:
            result = self._worker.call(method, on_event=on_event, **params)
        except WorkerError as error:
            result = self._again(error, method, on_event, params)
        if method == "load":
            self._policy = params
        return result

    def close(self) -> None:
        self._worker.close()

    def _again(
        self, error: WorkerError, method: str, on_event: OnEvent | None, params: dict[str, Any]
    ) -> Event:
        told = on_event or (lambda event: None)
        for shrink in SHRINKS:
            self._divisor *= shrink
            told({"event": "restarted", "method": method, "why": error.message.splitlines()[0]})
            self._worker.close()
            self._worker = self._make(self._divisor)
            try:
                if self._policy is not None and method != "load":
                    self._worker.call("load", on_event=on_event, **self._policy)
                return self._worker.call(method, on_event=on_event, **params)
            except WorkerError as again:
                error = again
        raise EngineError(
            f"The sampler failed three times, the last time with smaller batches. {error.message}"
        ) from error
