"""Asking the campaign's own model: a judge's questions become batches for its sampler."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Literal, Protocol

from online_dpo.asking.askers import OnEvent
from online_dpo.asking.judge_forms import Answer, Form
from online_dpo.asking.verdicts import Question
from online_dpo.errors import ConfigError
from online_dpo.paid.calls import CallContext
from online_dpo.paid.chat import ChatReply
from online_dpo.records import Message, derive_seed

Who = Literal["policy", "reference"]

BATCH = 512
"""Questions whose chats go to the sampler together."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One request to the own model, with its seed."""

    id: str
    messages: tuple[Message, ...]
    seed: int


class OwnModels(Protocol):
    """The policy and the reference that a round's plan records, ready to be asked."""

    def sha256(self, who: Who) -> str:
        """The hash of a model's files."""

    def reply(
        self, who: Who, chats: Sequence[Chat], *, temperature: float, max_tokens: int
    ) -> list[ChatReply | None]:
        """A reply to each chat, in their order; None where the model's context has no room."""


@dataclass(frozen=True, slots=True)
class Seed:
    """What a judge of the own model is given in place of the paid door."""

    seed: int


class OwnModelAsker:
    """Asks a judge whose methods yield chats and are sent the replies; see SelfJudge."""

    def __init__(self, form: Form, models: Callable[[], OwnModels | None], *, seed: int) -> None:
        self._form = form
        self._models = models
        self._seed = seed
        self._cancelled = False

    def answers(
        self, questions: Sequence[Question], *, purpose: str, round: int, on_event: OnEvent
    ) -> Generator[tuple[int, Answer], None, None]:
        models = self._models()
        if models is None:
            raise ConfigError(
                f"The judge {self._form.name!r} asks the model of a campaign's round, and there is "
                "none here. Name another judge."
            )
        for start in range(0, len(questions), BATCH):
            if self._cancelled:
                raise CancelledError("labelling was cancelled")
            answers = self._batch(questions[start : start + BATCH], purpose, round, models)
            yield from enumerate(answers, start)

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        """Nothing is held: the sampler is the campaign's."""

    def _batch(
        self, questions: Sequence[Question], purpose: str, round: int, models: OwnModels
    ) -> list[Answer]:
        seeds = [self._seed_of(CallContext.of(q, purpose, round)) for q in questions]
        asking = [self._form.asking(q, Seed(s)) for q, s in zip(questions, seeds, strict=True)]
        wanted = [next(judgement) for judgement in asking]
        chats = [
            Chat(f"{index}-{k}", messages, derive_seed(seeds[index], "reply", k))
            for index, group in enumerate(wanted)
            for k, messages in enumerate(group)
        ]
        judge = self._form.judge
        replies = iter(
            models.reply(
                judge.who, chats, temperature=judge.temperature, max_tokens=judge.max_tokens
            )
        )
        return [
            _ended(judgement, [next(replies) for _ in group])
            for judgement, group in zip(asking, wanted, strict=True)
        ]

    def _seed_of(self, context: CallContext) -> int:
        return derive_seed(
            self._seed, "judge", context.prompt_id, *context.response_ids,
            int(context.swapped), context.vote,
        )  # fmt: skip


def who_judges_whom(who: Who, *, evaluates: bool) -> str:
    """The warning that goes with a judge from within."""
    judge = "each round's policy" if who == "policy" else "each round's reference"
    text = (
        f"judge: {judge} judges the policy's own answers. What it overrates, training will make "
        "more of, and no figure of its own will show that."
    )
    if evaluates:
        text += (
            " It is the judge of the evaluations too: name another in evaluation.judge to see "
            "whether the policy gets better."
        )
    return text


def _ended(
    judgement: Generator[list[tuple[Message, ...]], list[ChatReply | None], Answer],
    replies: list[ChatReply | None],
) -> Answer:
    try:
        judgement.send(replies)
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    raise AssertionError("a judge of the own model asks once")
