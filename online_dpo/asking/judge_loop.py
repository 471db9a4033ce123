"""Asking an async judge: an event loop in a thread, bounded concurrency, deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from online_dpo.asking.askers import OnEvent
from online_dpo.asking.deadline import Deadline
from online_dpo.asking.invalid_replies import InvalidReplies
from online_dpo.asking.judge_forms import Answer, Form
from online_dpo.asking.verdicts import Question
from online_dpo.config import JudgeConfig
from online_dpo.errors import JudgeError
from online_dpo.paid.calls import CallContext
from online_dpo.paid.door import Door, OnCall

BLOCKED_GRACE_S = 5.0
"""How long past its deadline an event loop may stand still before the judge is given up."""

CLOSE_TIMEOUT_S = 3.0

_Item = tuple[int, Answer] | dict[str, Any]


class LoopAsker:
    """Asks up to `concurrency` questions, or a batch of them, at once.

    Paid calls go through one door and one ledger.
    """

    def __init__(
        self, form: Form, config: JudgeConfig, ledger_path: Path, *, seed: int, section: str
    ) -> None:
        """`section` is where the config stands in the campaign's. Raises ConfigError."""
        self._form = form
        self._config = config
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._invalid = InvalidReplies(config, section)
        self._door = Door(
            ledger_path, config, version=form.version, seed=seed, on_event=self._items.put
        )
        self._loop = asyncio.new_event_loop()
        # Waited for instead of the thread: a signal that interrupts Thread.join makes CPython
        # before 3.13 take a thread that still runs for ended.
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="judge", daemon=True).start()
        self._ending: Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._beat = 0.0

    def answers(
        self,
        questions: Sequence[Question],
        *,
        purpose: str,
        round: int,
        on_event: OnEvent,
    ) -> Generator[tuple[int, Answer], None, None]:
        """Yield (index, answer) as they come. Events of the door are passed on from this thread."""
        self._beat = time.monotonic()
        self._invalid.begin(purpose, round)
        work = self._answer_all(questions, purpose, round)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not (future.done() and self._items.empty()):
                with contextlib.suppress(queue.Empty):
                    item = self._items.get(timeout=0.2)
                    if isinstance(item, dict):
                        on_event(item)
                    else:
                        yield item
                self._check_beat(future)
            future.result()
        except BaseException:
            if not future.done():
                self.cancel()
            raise
        finally:
            if (summary := self._door.summary()) is not None:
                on_event(summary)

    def watch(self, on_call: OnCall) -> None:
        """Have every call told as it ends, on the judge's own thread."""
        self._door.on_call = on_call

    def cancel(self) -> None:
        """End the asking under way; calls in flight are recorded as unknown."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    def close(self) -> None:
        """Close connections and the ledger and end the thread, if it can still be ended."""
        if self._loop.is_closed():
            return
        if self._ending is None:
            self._ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        if self._ended.wait(timeout=CLOSE_TIMEOUT_S):
            self._loop.close()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._ended.set()

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._door.close()
        self._loop.call_soon(self._loop.stop)

    def _check_beat(self, future: Future[None]) -> None:
        still_s = time.monotonic() - self._beat
        if not future.done() and still_s > self._config.timeout_s + BLOCKED_GRACE_S:
            raise JudgeError(
                f"The judge {self._form.name!r} has blocked the event loop for {still_s:.0f} s. "
                "An `async def` method must await what takes time; a method that computes or "
                "blocks belongs in a plain `def`, which runs in a process of its own."
            )

    async def _answer_all(self, questions: Sequence[Question], purpose: str, round: int) -> None:
        self._task = asyncio.current_task()
        self._door.open()
        heart = asyncio.create_task(self._heartbeat())
        failures: list[Exception] = []
        jobs = iter(enumerate(questions))

        async def work() -> None:
            for index, question in jobs:
                try:
                    answer = await self._answer(question, purpose, round)
                    self._items.put((index, answer))
                    self._invalid.count(question, answer)
                except Exception as error:
                    failures.append(error)
                    self._door.refuse()
                if failures:
                    return

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._num_at_once, len(questions))):
                    group.create_task(work())
        finally:
            heart.cancel()
            await asyncio.wait([heart])
            self._task = None
        if failures:
            raise failures[0]

    async def _answer(self, question: Question, purpose: str, round: int) -> Answer:
        deadline = Deadline(self._config.timeout_s)
        calls = self._door.calls(CallContext.of(question, purpose, round), deadline)
        try:
            async with deadline:
                answer = await self._form.ask_async(question, calls)
        except TimeoutError:
            raise JudgeError(
                f"The judge {self._form.name!r} did not answer within "
                f"{self._config.timeout_s:g} s on prompt {question.prompt.id!r}. "
                "judge.timeout_s sets the deadline."
            ) from None
        if self._door.fatal is not None:  # even where the judge has caught it
            raise self._door.fatal
        calls.conclude(answer)
        return answer

    @property
    def _num_at_once(self) -> int:
        """Questions to ask at once: as many as are in flight, or as fill a batch."""
        batch = self._config.batch
        return self._config.concurrency if batch is None else batch.max_requests

    async def _heartbeat(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(0.2)
