"""A language model behind an OpenAI-compatible API that scores each response by a rubric."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from judges.llm_model import ChatModel, ModelOptions, is_too_long, json_schema
from judges.llm_replies import Scale, read_scores
from judges.llm_templates import JudgeTemplate, digest, read_principles, unused_fence
from online_dpo.asking.unusable_replies import TOO_LONG
from online_dpo.errors import ConfigError
from online_dpo.judging import Calls, ChatReply, RequestRefused
from online_dpo.records import Message, Prompt, Response, Score, derive_seed

RUBRICS = {
    "scale": ("pointwise.jinja", Scale(1, 10)),
    "additive": ("pointwise_additive.jinja", Scale(0, 5)),
    "criteria": ("pointwise_criteria.jinja", Scale(1, 10)),
}
"""Each rubric's template and scores: one grade from 1 to 10; a point for each of five things that
hold (2401.10020, figure 2); or a grade from 1 to 10 for each criterion.
"""


class LLMPointwise:
    """Asks for a score by JSON schema, or in words where the server takes no schema.

    `rubric` is scale, additive or criteria. For the last, `criteria` is a list of {name, weight
    (1), description}, and the score is the weighted mean of theirs. `template` takes the place of
    the rubric's own file. `principles` is a list, or a file with one a line.
    """

    name: ClassVar[str] = "llm_pointwise"

    def __init__(
        self,
        model: str,
        rubric: str = "scale",
        criteria: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
        principles: Sequence[str] | str = (),
        **model_options: Unpack[ModelOptions],
    ) -> None:
        """Raises ConfigError where an option cannot be used, or would not be."""
        self._model = ChatModel(model, **model_options)
        self.base_url = self._model.base_url
        self.api_key_env = self._model.api_key_env
        self.temperature = self._model.temperature
        """Of the judge's answers; at 0 they repeat."""
        self.price = self._model.price
        """Dollars per million tokens, in and out; None is unknown, with which no budget goes."""
        self._task = PointwiseTask(rubric, criteria, template, principles)
        self.version = f"1-{self._task.digest}"
        """Changes with template, criteria and principles, so that others' answers do not count."""

    async def score(
        self, prompt: Prompt, responses: Sequence[Response], *, calls: Calls
    ) -> list[Score]:
        """Each response's score; without a usable one its value is None, with the reason."""
        return [await self._one(prompt, response, calls) for response in responses]

    async def _one(self, prompt: Prompt, response: Response, calls: Calls) -> Score:
        question = self._task.question(prompt, response, calls.seed)
        try:
            reply = await self._model.ask(question.messages, self._task.schema, calls)
        except RequestRefused as refusal:
            if is_too_long(refusal):
                return Score(None, TOO_LONG)
            raise
        return question.read(reply)


@dataclass(frozen=True, slots=True)
class Criterion:
    """One part of a score."""

    name: str
    weight: float = 1.0
    description: str = ""


class PointwiseTask:
    """What a model is told to score a response, and how its reply is read."""

    def __init__(
        self,
        rubric: str,
        criteria: Sequence[Mapping[str, Any]],
        template: str | None,
        principles: Sequence[str] | str,
    ) -> None:
        if rubric not in RUBRICS:
            raise ConfigError(
                f"judge.options.rubric is one of {', '.join(RUBRICS)}, not {rubric!r}."
            )
        own_template, self.scale = RUBRICS[rubric]
        self.template = JudgeTemplate(template or own_template)
        self.principles = read_principles(principles)
        self.criteria = _criteria(rubric, criteria)
        settings = {"rubric": rubric, "criteria": self.criteria, "principles": self.principles}
        self.digest = digest(self.template, settings)
        scores = list(range(self.scale.lowest, self.scale.highest + 1))
        grade = {"type": "integer", "enum": scores}
        self.schema = json_schema("score", {criterion.name: grade for criterion in self.criteria})

    def question(self, prompt: Prompt, response: Response, seed: int) -> PointwiseQuestion:
        """One response's grading, fenced by a word from the seed and the response."""
        fence = unused_fence(derive_seed(seed, response.id), prompt, response.text)
        return PointwiseQuestion(self, prompt, response.text, fence)


@dataclass(frozen=True, slots=True)
class PointwiseQuestion:
    """One response's grading as messages, and the reading of the reply to them."""

    task: PointwiseTask
    prompt: Prompt
    response: str
    fence: str

    def messages(self, structured: bool) -> tuple[Message, ...]:
        """Raises ConfigError where the template cannot be rendered."""
        return self.task.template.render(
            self.prompt,
            response=self.response,
            fence=self.fence,
            criteria=[(criterion.name, criterion.description) for criterion in self.task.criteria],
            lowest=self.task.scale.lowest,
            highest=self.task.scale.highest,
            principles=self.task.principles,
            structured=structured,
        )

    def read(self, reply: ChatReply) -> Score:
        """The mean of the scores, by the criteria's weights, or the reason why there is none."""
        criteria = self.task.criteria
        names = [criterion.name for criterion in criteria]
        scores, reason = read_scores(reply, names, self.task.scale, self.fence, (self.response,))
        if reason is not None:
            return Score(None, reason)
        total = sum(criterion.weight for criterion in criteria)
        weighted = sum(c.weight * score for c, score in zip(criteria, scores, strict=True))
        return Score(weighted / total)


def _criteria(rubric: str, criteria: Sequence[Mapping[str, Any]]) -> tuple[Criterion, ...]:
    if (rubric == "criteria") != bool(criteria):
        raise ConfigError(
            "judge.options.criteria goes with judge.options.rubric: criteria, and neither without "
            f"the other; the rubric is {rubric!r}, the criteria are {list(criteria)}."
        )
    if not criteria:
        return (Criterion("score"),)
    found = tuple(_criterion(row) for row in criteria)
    names = [criterion.name.lower() for criterion in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"judge.options.criteria: two have the same name, of {names}.")
    return found


def _criterion(row: Any) -> Criterion:
    try:
        found = Criterion(**row)
        named = re.fullmatch(r"[A-Za-z][A-Za-z0-9_ -]*", found.name)
        weighted = 0.0 < float(found.weight) < float("inf")
    except (TypeError, ValueError):
        named, weighted = None, False
    if named is None or not weighted:
        raise ConfigError(
            "judge.options.criteria are {name: words and digits, weight: above 0, description: "
            f"text}}, not {row}."
        )
    return found
