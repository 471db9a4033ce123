"""What a judge is given to pay with: one judgement's view of the door."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from online_dpo.asking.deadline import Deadline
from online_dpo.asking.verdicts import Question
from online_dpo.paid.chat import ChatReply, ChatRequest, Estimate
from online_dpo.records import Score, Verdict

if TYPE_CHECKING:
    from online_dpo.paid.door import Door


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a call is for: part of its key, apart from purpose and round.

    `judge` and `version` are those of the judge that asks, where it is not the door's own.
    """

    prompt_id: str
    response_ids: tuple[str, ...]
    swapped: bool
    vote: int
    purpose: str
    round: int
    judge: str | None = None
    version: str | None = None

    @classmethod
    def of(cls, question: Question, purpose: str, round: int) -> CallContext:
        """The context of a question; a pair's ids stand in the pair's order, not as shown."""
        ids = tuple(response.id for response in question.responses)
        ids = ids[::-1] if question.swapped else ids
        return cls(question.prompt.id, ids, question.swapped, question.vote, purpose, round)


class Calls:
    """The door as one judgement sees it. `seed` is the judgement's own, for what must repeat."""

    def __init__(self, door: Door, context: CallContext, deadline: Deadline, seed: int) -> None:
        self._door = door
        self._context = context
        self._deadline = deadline
        self._keys: list[str] = []
        self.seed = seed

    async def complete(self, request: ChatRequest, *, estimate: Estimate) -> ChatReply:
        """The reply to a request, from the ledger or paid for within the budget.

        Raises RequestRefused where the server will not serve it as it is, JudgeError where it
        fails for good, BudgetError where the budget has no room.
        """
        with self._deadline.paused():
            reply = await self._door.complete(request, estimate, self._context)
        self._keys.append(reply.key)
        return reply

    def conclude(self, answer: Verdict | tuple[Score, ...]) -> None:
        """Write what was made of the replies beside them in the ledger, without waiting for it."""
        if self._keys:
            self._door.conclude(self._keys, answer_to_json(answer))

    @property
    def vote(self) -> int:
        """Which of `judge.votes` this judgement is, from 0."""
        return self._context.vote

    @property
    def swapped(self) -> bool:
        """Whether a pair is shown in the reverse of its order."""
        return self._context.swapped

    def paused(self) -> AbstractContextManager[None]:
        """Stops the judgement's deadline, while it waits for what has one of its own."""
        return self._deadline.paused()

    def of_member(
        self, judge: str, version: str, deadline: Deadline, *, response_id: str | None = None
    ) -> Calls:
        """The door for a judge that this one asks, under that one's name, about the same question.

        With `response_id` it is asked about this response alone. What makes its calls fail ends
        that judgement and no other.
        """
        context = replace(self._context, judge=judge, version=version)
        if response_id is not None:
            context = replace(context, response_ids=(response_id,), swapped=False)
        return self._door.calls(context, deadline)

    def tell(self, event: dict[str, Any]) -> None:
        """Put an event into the run's record."""
        self._door.tell(event)


def answer_to_json(answer: Verdict | tuple[Score, ...]) -> str:
    """A verdict or scores as the ledger shows them; the raw reply stands there already."""
    if isinstance(answer, Verdict):
        return json.dumps({"p": answer.p, "reason": answer.reason})
    return json.dumps({"scores": [asdict(score) for score in answer]})
