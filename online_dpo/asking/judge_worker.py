"""A synchronous judge in a process of its own: the handler there, the client with a deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from online_dpo.asking.judge_forms import Answer, make_form
from online_dpo.asking.verdicts import Question
from online_dpo.errors import EngineError, JudgeError
from online_dpo.records import Score, Verdict, prompt_from_dict, response_from_dict, to_dict
from online_dpo.workers import ChildWorker

START_TIMEOUT_S = 900.0
"""Importing and making a judge; a reward model may have to be loaded, or even downloaded."""

Emit = Callable[[dict[str, Any]], None]


class JudgeHandler:
    """Answers questions inside the worker process."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        base = settings["base"]
        self._form = make_form(
            settings["name"], settings["options"], None if base is None else Path(base)
        )

    def describe(self, *, emit: Emit) -> dict[str, Any]:
        """What the judge is: kind, mode, version and whether it is a plain function."""
        form = self._form
        return {
            "kind": form.kind,
            "mode": form.mode,
            "version": form.version,
            "function": form.function,
        }

    def ask(
        self, *, emit: Emit, prompt: dict[str, Any], responses: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """One answer as plain types. Raises JudgeError where the judge fails."""
        question = Question(
            prompt_from_dict(prompt), tuple(response_from_dict(row) for row in responses)
        )
        try:
            answer = self._form.ask(question, NO_CALLS)
        except SystemExit as error:
            cause = JudgeError(
                f"The judge {self._form.name!r} called sys.exit({error.code}) on prompt "
                f"{question.prompt.id!r}."
            )
            raise cause from error
        if isinstance(answer, Verdict):
            return {"verdict": asdict(answer)}
        return {"scores": [asdict(score) for score in answer]}

    def close(self) -> None:
        """Let the judge end what it has started, if it says how."""
        if callable(close := getattr(self._form.judge, "close", None)):
            close()


class _NoCalls:
    """Stands for the paid door in a process that has none."""

    seed = 0

    def complete(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("calls.complete is for judges whose methods are `async def`")


NO_CALLS = _NoCalls()


class JudgeProcess:
    """The worker process of one judge, started when first asked and again after it was killed."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        base: Path | None,
        *,
        run: Path,
        log: Path,
        env: Mapping[str, str],
    ) -> None:
        settings = {
            "name": name,
            "options": dict(options),
            "base": None if base is None else str(base),
        }
        self._name = name
        self._worker = ChildWorker(
            "judge",
            "online_dpo.asking.judge_worker:JudgeHandler",
            settings,
            run=run,
            log=log,
            env=env,
        )

    def describe(self) -> dict[str, Any]:
        """What the judge is. Raises ConfigError where it cannot be imported or made."""
        return self._call("describe", START_TIMEOUT_S, "while it was imported and made")

    def ask(self, question: Question, *, timeout_s: float) -> Answer:
        """One answer. Raises JudgeError where the judge fails, hangs or dies."""
        if self._worker.pid is None:
            self.describe()
        result = self._call(
            "ask",
            timeout_s,
            f"on prompt {question.prompt.id!r}",
            prompt=to_dict(question.prompt),
            responses=[to_dict(response) for response in question.responses],
        )
        if "verdict" in result:
            return Verdict(**result["verdict"])
        return tuple(Score(**score) for score in result["scores"])

    def kill(self) -> None:
        """End the process at once, from any thread; a call under way then fails."""
        pid = self._worker.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _call(self, method: str, timeout_s: float, when: str, **params: Any) -> dict[str, Any]:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            return self._worker.call(method, **params)
        except EngineError as error:
            if expired.is_set():
                raise JudgeError(
                    f"The judge {self._name!r} did not answer within {timeout_s:g} s {when}. "
                    f"Its log: {self._worker.log}. judge.timeout_s sets the deadline."
                ) from None
            raise JudgeError(f"The judge {self._name!r} died {when}. {error.message}") from error
        finally:
            timer.cancel()
