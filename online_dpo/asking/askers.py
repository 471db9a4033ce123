"""Where a judge is asked: in this process, or in one of its own; judge_loop asks async ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError
from typing import Any, Protocol

from online_dpo.asking.judge_forms import Answer, Form
from online_dpo.asking.judge_worker import JudgeProcess
from online_dpo.asking.verdicts import Question
from online_dpo.config import JudgeConfig
from online_dpo.errors import JudgeError

OnEvent = Callable[[dict[str, Any]], None]


class Asker(Protocol):
    """Answers questions in order; `cancel`, from another thread, makes it raise CancelledError."""

    def answers(
        self, questions: Sequence[Question], *, purpose: str, round: int, on_event: OnEvent
    ) -> Generator[tuple[int, Answer], None, None]:
        """Yield (index of the question, answer) in whatever order they come."""

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class InlineAsker:
    """Asks a pure and quick judge directly."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._cancelled = False

    def answers(
        self, questions: Sequence[Question], *, purpose: str, round: int, on_event: OnEvent
    ) -> Generator[tuple[int, Answer], None, None]:
        for index, question in enumerate(questions):
            if self._cancelled:
                raise CancelledError("labelling was cancelled")
            yield index, self._form.ask(question, None)

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        """Nothing is held."""


class ProcessAsker:
    """Asks a synchronous judge in its process, one question at a time, each with a deadline."""

    def __init__(self, process: JudgeProcess, config: JudgeConfig, per_response: bool) -> None:
        self._process = process
        self._timeout_s = config.timeout_s
        self._per_response = per_response
        self._cancelled = False

    def answers(
        self, questions: Sequence[Question], *, purpose: str, round: int, on_event: OnEvent
    ) -> Generator[tuple[int, Answer], None, None]:
        for index, question in enumerate(questions):
            calls = len(question.responses) if self._per_response else 1
            try:
                answer = self._process.ask(question, timeout_s=self._timeout_s * max(calls, 1))
            except JudgeError:
                self._raise_if_cancelled()
                raise
            self._raise_if_cancelled()
            yield index, answer

    def cancel(self) -> None:
        self._cancelled = True
        self._process.kill()

    def close(self) -> None:
        self._process.close()

    def _raise_if_cancelled(self) -> None:
        if self._cancelled:
            raise CancelledError("labelling was cancelled") from None
