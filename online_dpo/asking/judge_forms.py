"""One way to ask every form that a judge may take: class or function, synchronous or async."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal

from online_dpo import plugins
from online_dpo.asking.verdicts import Kind, Question, checked_scores, checked_verdict
from online_dpo.errors import ConfigError, JudgeError
from online_dpo.records import Score, Verdict

Mode = Literal["inline", "async", "worker", "own_model", "people"]
"""inline: pure and quick, called directly; async: on the event loop; worker: in its own process;
own_model: it yields chats for the campaign's own model and is sent the replies; people: called once
enough of them have answered.
"""

Answer = Verdict | tuple[Score, ...]

_METHODS: tuple[Kind, Kind] = ("score", "compare")


class Form:
    """A judge that can be asked, whatever form it was written in."""

    def __init__(self, judge: Any, *, name: str) -> None:
        """Raises ConfigError where `judge` has neither a judge's methods nor its parameters."""
        self.name = name
        self.judge = judge
        self.function = not any(callable(getattr(judge, method, None)) for method in _METHODS)
        self.kind = _function_kind(judge, name) if self.function else kind_of(judge, name)
        self.mode = mode_of(judge)
        self._ask: Callable[..., Any] = judge if self.function else getattr(judge, self.kind)
        self._takes_calls = _takes_calls(self._ask)

    @property
    def version(self) -> str:
        """The judge's own version, part of every key in the ledger."""
        return str(getattr(self.judge, "version", "0"))

    def ask(self, question: Question, calls: Any) -> Answer:
        """The checked answer of a synchronous judge. Raises JudgeError where it fails."""
        try:
            if self.function and self.kind == "score":
                result = [
                    self._ask(question.prompt, response, **self._extra(calls))
                    for response in question.responses
                ]
            else:
                result = self._ask(*self._arguments(question), **self._extra(calls))
            return self._checked(result, question)
        except Exception as error:
            raise judge_error(self.name, question, error) from error

    async def ask_async(self, question: Question, calls: Any) -> Answer:
        """The checked answer of an async judge. Raises JudgeError where it fails."""
        try:
            if self.function and self.kind == "score":
                result = [
                    await self._ask(question.prompt, response, **self._extra(calls))
                    for response in question.responses
                ]
            else:
                result = await self._ask(*self._arguments(question), **self._extra(calls))
            return self._checked(result, question)
        except Exception as error:
            raise judge_error(self.name, question, error) from error

    def asking(self, question: Question, calls: Any) -> Generator[Any, Any, Answer]:
        """What a judge of the own model yields, then its checked answer. Raises JudgeError."""
        try:
            result = yield from self._ask(*self._arguments(question), **self._extra(calls))
            return self._checked(result, question)
        except Exception as error:
            raise judge_error(self.name, question, error) from error

    def _arguments(self, question: Question) -> tuple[Any, ...]:
        if self.kind == "score":
            return question.prompt, question.responses
        return question.prompt, *question.responses

    def _extra(self, calls: Any) -> dict[str, Any]:
        return {"calls": calls} if self._takes_calls else {}

    def _checked(self, result: Any, question: Question) -> Answer:
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError("a synchronous method returned a coroutine; declare it `async def`")
        if self.kind == "score":
            return checked_scores(result, len(question.responses))
        return checked_verdict(result)


def make_form(name: str, options: dict[str, Any], base: Path | None) -> Form:
    """The judge that a config names, imported and made. Raises ConfigError where that fails."""
    target = plugins.resolve(name, base=base)
    try:
        return Form(plugins.instantiate(target, options, name=name), name=name)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The judge {name!r} cannot be made with judge.options {options}: "
            f"{type(error).__name__}: {error}"
        ) from error


def mode_of(target: Any) -> Mode:
    """Where a judge, or a class of judges, is called."""
    if getattr(target, "people", False):
        return "people"
    if getattr(target, "inline", False):
        return "inline"
    methods = [getattr(target, method, None) for method in _METHODS]
    asked = [method for method in methods if callable(method)] or [target]
    if any(inspect.isgeneratorfunction(method) for method in asked):
        return "own_model"
    return "async" if any(inspect.iscoroutinefunction(method) for method in asked) else "worker"


def repeats_itself(judge: Any) -> bool:
    """Whether a judge says that it draws its answers at temperature 0, so that votes are one."""
    temperature = getattr(judge, "temperature", None)
    return isinstance(temperature, int | float) and temperature == 0


def is_built_in(name: str) -> bool:
    """Whether a name stands for one of our own judges, whose module is light to import."""
    if plugins.names_code(name):
        return False
    point = plugins.available().get(name)
    return point is not None and point.value.split(":")[0].split(".")[0] == "judges"


def judge_error(name: str, question: Question, error: Exception) -> Exception:
    """The JudgeError for what a judge raised; the campaign's own errors stay what they are."""
    from online_dpo.errors import CampaignError

    if isinstance(error, CampaignError):
        return error
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    return JudgeError(f"The judge {name!r} failed on prompt {question.prompt.id!r}: {cause}")


def kind_of(judge: Any, name: str) -> Kind:
    """What a judge, or a class of judges, does. Raises ConfigError where it does not say."""
    kinds = [method for method in _METHODS if callable(getattr(judge, method, None))]
    stated = getattr(judge, "kind", None)
    if stated in kinds:
        return stated  # type: ignore[no-any-return]
    if len(kinds) == 1:
        return kinds[0]
    raise ConfigError(
        f"The judge {name!r} has both `score` and `compare`; its attribute `kind` must say "
        '"score" or "compare".'
    )


def _function_kind(judge: Any, name: str) -> Kind:
    kind = plugins.function_kind(judge) if callable(judge) else None
    if kind == "score" or kind == "compare":
        return kind  # type: ignore[return-value]
    raise ConfigError(
        f"{name!r} is no judge: it is a {type(judge).__name__} without a method "
        "`score(prompt, responses)` or `compare(prompt, first, second)`, and no function of "
        "(prompt, response) or (prompt, first, second)."
    )


def _takes_calls(ask: Callable[..., Any]) -> bool:
    parameters = inspect.signature(ask).parameters
    return "calls" in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )
