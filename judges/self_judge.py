"""The campaign's own policy or reference as the judge (self-rewarding, 2401.10020)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from judges.llm_pairwise import PairwiseTask
from judges.llm_pointwise import PointwiseTask
from online_dpo.asking.own_model import Seed
from online_dpo.asking.unusable_replies import TOO_LONG
from online_dpo.errors import ConfigError
from online_dpo.judging import ChatReply
from online_dpo.records import Message, Prompt, Response, Score, Verdict

Messages = list[tuple[Message, ...]]
Replies = list[ChatReply | None]


class SelfJudge:
    """Asks in words, with the LLM judges' templates, the model that a round's plan records.

    `who` is policy (the one that gave the answers) or reference. With `rubric` it scores, as
    llm_pointwise does; without, it compares. Its methods yield messages and are sent the replies:
    the campaign's sampler gives them in batches, and nothing is paid.
    """

    name: ClassVar[str] = "self"

    def __init__(
        self,
        who: str = "policy",
        rubric: str | None = None,
        criteria: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
        principles: Sequence[str] | str = (),
        temperature: float = 0.0,
        max_tokens: int = 512,
    ) -> None:
        """Raises ConfigError where an option cannot be used, or would not be."""
        if who not in ("policy", "reference"):
            raise ConfigError(f"judge.options.who is policy or reference, not {who!r}.")
        if rubric is None and criteria:
            raise ConfigError("judge.options.criteria goes with judge.options.rubric: criteria.")
        if not (temperature >= 0.0 and max_tokens >= 1):
            raise ConfigError(
                "judge.options.temperature is 0 or more and max_tokens 1 or more, not "
                f"{temperature!r} and {max_tokens!r}."
            )
        self.who = who
        self.kind: Literal["compare", "score"] = "compare" if rubric is None else "score"
        self.temperature = temperature
        self.max_tokens = max_tokens
        self._pairwise: PairwiseTask | None = None
        self._pointwise: PointwiseTask | None = None
        if rubric is None:
            self._pairwise = PairwiseTask(template or "pairwise.jinja", principles)
            digest = self._pairwise.digest
        else:
            self._pointwise = PointwiseTask(rubric, criteria, template, principles)
            digest = self._pointwise.digest
        self.version = f"1-{digest}-{who}"
        """The label stage adds the hash of the model's weights."""

    def compare(
        self, prompt: Prompt, first: Response, second: Response, *, calls: Seed
    ) -> Generator[Messages, Replies, Verdict]:
        """The verdict in the reply; without a usable one p is None, with the reason."""
        assert self._pairwise is not None
        question = self._pairwise.question(prompt, first, second, calls.seed)
        (reply,) = yield [question.messages(False)]
        if reply is None:
            return Verdict(None, TOO_LONG)
        found = question.read(reply)
        return Verdict(found.p, found.reason, reply.text)

    def score(
        self, prompt: Prompt, responses: Sequence[Response], *, calls: Seed
    ) -> Generator[Messages, Replies, list[Score]]:
        """Each response's score; without a usable one its value is None, with the reason."""
        assert self._pointwise is not None
        task = self._pointwise
        questions = [task.question(prompt, response, calls.seed) for response in responses]
        replies = yield [question.messages(False) for question in questions]
        return [
            Score(None, TOO_LONG) if reply is None else question.read(reply)
            for question, reply in zip(questions, replies, strict=True)
        ]
