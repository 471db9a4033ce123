"""A language model behind an OpenAI-compatible API that says which of two responses is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

from judges.llm_model import ChatModel, ModelOptions, is_too_long, json_schema
from judges.llm_replies import Reading, read_verdict
from judges.llm_soft import soft_p
from judges.llm_templates import JudgeTemplate, digest, read_principles, unused_fence
from online_dpo.asking.unusable_replies import TOO_LONG
from online_dpo.errors import ConfigError
from online_dpo.judging import Calls, ChatReply, RequestRefused
from online_dpo.records import Message, Prompt, Response, Verdict

VERDICT_SCHEMA = json_schema("verdict", {"verdict": {"type": "string", "enum": ["A", "B", "tie"]}})

MIN_MASS = 0.5


class LLMPairwise:
    """Asks for a verdict by JSON schema, or in words where the server takes no schema.

    `template` is a file with the blocks `system` and `user`; see prompts/pairwise.jinja.
    `principles`, a list or a file with one a line, take the place of the template's own.
    `soft` takes p from the log-probs of the verdict's tokens, among the `top_logprobs` likeliest;
    where A, B and tie hold less than `min_mass` (0.5) of the probability, there is no verdict.
    """

    name: ClassVar[str] = "llm_pairwise"

    def __init__(
        self,
        model: str,
        template: str = "pairwise.jinja",
        principles: Sequence[str] | str = (),
        soft: bool = False,
        top_logprobs: int | None = None,
        min_mass: float | None = None,
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
        self._task = PairwiseTask(template, principles)
        self._soft = _soft(soft, top_logprobs, min_mass)
        self.version = f"2-{self._task.digest}"
        """Changes with the template and the principles, so that answers to others are not taken."""

    async def compare(
        self, prompt: Prompt, first: Response, second: Response, *, calls: Calls
    ) -> Verdict:
        """The model's verdict; without a usable one p is None, with the reason and its words."""
        question = self._task.question(prompt, first, second, calls.seed)
        top = None if self._soft is None else self._soft.top_logprobs
        try:
            reply = await self._model.ask(question.messages, VERDICT_SCHEMA, calls, top=top)
        except RequestRefused as refusal:
            if is_too_long(refusal):
                return Verdict(None, TOO_LONG, str(refusal))
            raise
        found = question.read(reply)
        if self._soft is None or found.p is None:
            return Verdict(found.p, found.reason, reply.text)
        return Verdict(*self._softened(reply, found, self._soft), reply.text)

    def _softened(
        self, reply: ChatReply, found: Reading, soft: Soft
    ) -> tuple[float | None, str | None]:
        if reply.logprobs is None:
            raise ConfigError(
                f"judge.options.soft needs the log-probs of tokens, and {self._model.name!r} at "
                f"{self.base_url or 'the API'} gives none. Leave soft out, or take a server that "
                "gives them."
            )
        return soft_p(reply.text, found.at, found.label, reply.logprobs, min_mass=soft.min_mass)


@dataclass(frozen=True, slots=True)
class Soft:
    """How p is taken from log-probs."""

    top_logprobs: int
    min_mass: float


class PairwiseTask:
    """What a model is told to compare two responses, and how its reply is read."""

    def __init__(self, template: str, principles: Sequence[str] | str) -> None:
        self._template = JudgeTemplate(template)
        self._principles = read_principles(principles)
        self.digest = digest(self._template, {"principles": self._principles})

    def question(
        self, prompt: Prompt, first: Response, second: Response, seed: int
    ) -> PairwiseQuestion:
        """One comparison, fenced by a word from the seed."""
        fence = unused_fence(seed, prompt, first.text, second.text)
        return PairwiseQuestion(
            self._template, self._principles, prompt, first.text, second.text, fence
        )


@dataclass(frozen=True, slots=True)
class PairwiseQuestion:
    """One comparison as messages, and the reading of the reply to them."""

    template: JudgeTemplate
    principles: tuple[str, ...]
    prompt: Prompt
    first: str
    second: str
    fence: str

    def messages(self, structured: bool) -> tuple[Message, ...]:
        """Raises ConfigError where the template cannot be rendered."""
        return self.template.render(
            self.prompt,
            first=self.first,
            second=self.second,
            fence=self.fence,
            principles=self.principles,
            structured=structured,
        )

    def read(self, reply: ChatReply) -> Reading:
        return read_verdict(reply, self.fence, (self.first, self.second))


def _soft(soft: bool, top_logprobs: int | None, min_mass: float | None) -> Soft | None:
    if not soft:
        if top_logprobs is not None or min_mass is not None:
            raise ConfigError(
                "judge.options.top_logprobs and min_mass say how soft verdicts are taken from "
                "log-probs; set judge.options.soft: true, or leave them out."
            )
        return None
    top = 20 if top_logprobs is None else top_logprobs
    mass = MIN_MASS if min_mass is None else min_mass
    if not (isinstance(top, int) and top >= 2):
        raise ConfigError(f"judge.options.top_logprobs is 2 or more, not {top!r}.")
    if not 0.0 < mass <= 1.0:
        raise ConfigError(f"judge.options.min_mass is a probability above 0, not {mass!r}.")
    return Soft(top, mass)
