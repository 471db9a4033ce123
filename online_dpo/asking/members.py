"""The judges that another judge asks: each where it runs, through a door of its own name."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from online_dpo.asking.deadline import Deadline
from online_dpo.asking.judge_forms import Answer, Form, Mode, repeats_itself
from online_dpo.asking.judge_opening import check_key, open_judge
from online_dpo.asking.verdicts import Kind, Question
from online_dpo.config import JudgeConfig
from online_dpo.errors import ConfigError, JudgeError
from online_dpo.judge_clashes import of_judge
from online_dpo.paid.calls import Calls
from online_dpo.paid.prices import is_priced
from online_dpo.records import Prompt, Response, Score, Verdict

MAX_REMEMBERED = 1024
"""Scores of a judge in a process that are kept for further pairs of the same responses."""


@dataclass(frozen=True)
class Host:
    """What a judge that asks others is lent to run them: see `Member`."""

    base: Path | None
    """Where relative files are looked up from."""
    run: Path
    log: Path
    config: JudgeConfig
    """Of the judge that asks: `timeout_s` is the deadline of each member's judgement, paid calls
    excluded, and its prices and service tier hold for what members pay."""
    env: Mapping[str, str]
    """What a member's own process has in its environment beside ours."""


class Member:
    """A judge that another one asks to compare two responses, whatever its kind and mode.

    One that scores is asked about each response by itself, so that a paid score is bought once for
    all pairs; two scores become p by sigmoid(difference / scale). For one event loop.
    """

    def __init__(self, config: JudgeConfig, host: Host, *, section: str) -> None:
        """`section` is where the config stands, for messages. Raises ConfigError."""
        self.config = config
        self._timeout_s = host.config.timeout_s
        self._judge = open_judge(
            config.name, config.options, host.base, run=host.run, log=host.log, env=host.env
        )
        self._paying = paying_like(config, host.config)
        self._turn = asyncio.Lock()
        self._in_process = threading.Lock()
        self._remembered: dict[tuple[str, str, str, int], Score] = {}
        try:
            if self._judge.form is not None:
                _check_form(self._judge.form, self.mode, section)
            clashes = of_judge(
                config,
                section=section,
                compares=self.kind == "compare",
                mode=self.mode,
                priced=self.priced,
            )
            if (problem := next(clashes, None)) is not None:
                raise ConfigError(f"{problem}.")
        except BaseException:
            self.close()
            raise

    @property
    def kind(self) -> Kind:
        return self._judge.kind

    @property
    def mode(self) -> Mode:
        return self._judge.mode

    @property
    def version(self) -> str:
        return self._judge.version

    @property
    def priced(self) -> bool:
        """False where nobody knows what its calls cost."""
        form = self._judge.form
        return form is None or is_priced(form.judge, self._paying)

    @property
    def repeats(self) -> bool:
        """Whether it says that it answers at temperature 0."""
        form = self._judge.form
        return form is not None and repeats_itself(form.judge)

    async def compare(
        self, prompt: Prompt, first: Response, second: Response, *, calls: Calls
    ) -> Verdict:
        """Its verdict on two responses. Raises JudgeError where it fails or takes too long."""
        if self.kind == "compare":
            question = Question(prompt, (first, second), calls.vote, calls.swapped)
            answer = await self._ask(question, calls, None)
            assert isinstance(answer, Verdict)
            return answer
        one, other = await self._scores(prompt, (first, second), calls)
        return verdict_of_scores(one, other, scale=self.config.scale)

    def close(self) -> None:
        """End its process, or what else it holds. Safe to repeat."""
        process, form = self._judge.process, self._judge.form
        if process is not None:
            process.kill()
            with self._in_process:
                process.close()
        if form is not None and callable(close := getattr(form.judge, "close", None)):
            close()

    async def _scores(
        self, prompt: Prompt, responses: Sequence[Response], calls: Calls
    ) -> list[Score]:
        if self.mode != "worker":
            return [await self._score(prompt, response, calls) for response in responses]
        async with self._turn:
            keys = [(prompt.id, r.id, r.text, calls.vote) for r in responses]
            new = [i for i, key in enumerate(keys) if key not in self._remembered]
            if new:
                question = Question(prompt, tuple(responses[i] for i in new), calls.vote)
                answer = await self._ask_process(question)
                assert isinstance(answer, tuple)
                self._remembered |= {keys[i]: s for i, s in zip(new, answer, strict=True)}
            scores = [self._remembered[key] for key in keys]
            while len(self._remembered) > MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            return scores

    async def _score(self, prompt: Prompt, response: Response, calls: Calls) -> Score:
        answer = await self._ask(Question(prompt, (response,), calls.vote), calls, response.id)
        assert isinstance(answer, tuple)
        return answer[0]

    async def _ask(self, question: Question, calls: Calls, response_id: str | None) -> Answer:
        if self.mode == "worker":
            async with self._turn:
                return await self._ask_process(question)
        form = self._judge.form
        assert form is not None
        if self.mode == "inline":
            return form.ask(question, None)
        deadline = Deadline(self._timeout_s)
        own = calls.of_member(self.config.name, self.version, deadline, response_id=response_id)
        try:
            async with deadline:
                answer = await form.ask_async(question, own)
        except TimeoutError:
            raise JudgeError(
                f"The judge {self.config.name!r} did not answer within {self._timeout_s:g} s on "
                f"prompt {question.prompt.id!r}. judge.timeout_s sets the deadline."
            ) from None
        own.conclude(answer)
        return answer

    async def _ask_process(self, question: Question) -> Answer:
        return await asyncio.to_thread(self._ask_blocking, question)

    def _ask_blocking(self, question: Question) -> Answer:
        process = self._judge.process
        assert process is not None
        calls = len(question.responses) if self._judge.function else 1
        with self._in_process:
            return process.ask(question, timeout_s=self._timeout_s * calls)


def _check_form(form: Form, mode: Mode, section: str) -> None:
    """Raise ConfigError for what cannot be asked by another judge, or misses its key."""
    if mode == "own_model":
        raise ConfigError(
            f"{section}: {form.name!r} is asked through the campaign's sampler, which no other "
            "judge can wait for. Let it judge alone, or serve the model behind an API."
        )
    if mode == "people":
        raise ConfigError(
            f"{section}: people answer {form.name!r} on a page, when they like; nothing else can "
            "wait for them. Let it judge alone: its options annotators, per_item and combine have "
            "several people vote."
        )
    check_key(form.judge)


def paying_like(member: JudgeConfig, judge: JudgeConfig) -> JudgeConfig:
    """A member's config with the prices and the service tier of the judge that asks it."""
    values = {**dict(member), "prices": judge.prices, "service_tier": judge.service_tier}
    return JudgeConfig.model_construct(_fields_set=set(member.model_fields_set), **values)


def all_repeat(members: Iterable[tuple[Mode, bool]]) -> bool:
    """Whether votes would buy the same answers again: of members (mode, repeats), each that may pay
    for calls repeats itself, and one does.
    """
    paying = [repeats for mode, repeats in members if mode == "async"]
    return bool(paying) and all(paying)


def most_demanding(modes: Iterable[Mode]) -> Mode:
    """How the member runs that needs most: async where one may pay for calls."""
    order: tuple[Mode, ...] = ("async", "worker", "inline")
    return min(modes, key=order.index)


def verdict_of_scores(first: Score, second: Score, *, scale: float) -> Verdict:
    """p by sigmoid(difference / scale); no verdict without both scores. Swapping gives 1 - p."""
    if first.value is None or second.value is None:
        return Verdict(None, first.reason if first.value is None else second.reason)
    difference = (first.value - second.value) / scale
    larger = 1.0 / (1.0 + math.exp(-abs(difference)))
    p = larger if difference >= 0 else 1.0 - larger
    return Verdict(p, raw=f"{first.value:g} and {second.value:g}")
