"""Asks people: posts what labelling wants to know, and answers when enough of them have."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

from online_dpo.annotation.agreement import agreement
from online_dpo.annotation.board import Board, Part
from online_dpo.annotation.items import Item, item_of
from online_dpo.asking.askers import OnEvent
from online_dpo.asking.judge_forms import Answer, Form
from online_dpo.asking.verdicts import Question
from online_dpo.errors import WaitingError
from online_dpo.records import Prompt, Response

Votes = Mapping[str, Mapping[str, float | None]]


class Ballots:
    """The verdicts that a human judge makes its own of, given to it as its `calls`."""

    def __init__(self, votes: Votes) -> None:
        self._votes = votes

    def on(self, prompt: Prompt, responses: Sequence[Response]) -> dict[str, float | None]:
        """Each annotator's word on one response or two, by name; None where they skipped.

        1: the first is better, or the only one good; 0.5: a tie; 0: the contrary.
        """
        item, reversed_ = item_of(prompt, responses)
        votes = self._votes.get(item.id, {})
        return {
            name: 1.0 - value if reversed_ and value is not None else value
            for name, value in sorted(votes.items())
        }


class PeopleAsker:
    """Answers from people's verdicts; raises WaitingError while there are too few."""

    def __init__(self, form: Form, *, run: Path, seed: int) -> None:
        self._form = form
        self._gold: Sequence[Item] = form.judge.gold
        self._board = Board(run, form.judge.options, seed=seed)
        self._cancelled = False

    def answers(
        self, questions: Sequence[Question], *, purpose: str, round: int, on_event: OnEvent
    ) -> Generator[tuple[int, Answer], None, None]:
        part = self._post(questions, purpose)
        if not part.closed:
            if self._board.lacking(part.items, self._board.votes()):
                raise WaitingError(self._waiting(purpose, round))
            # Before the verdicts are read for good: an undo can come at any time.
            self._board.close(purpose, part)
        votes = self._board.votes()
        figures = agreement([votes.get(item.id, {}) for item in part.items])
        on_event({"event": "people", "purpose": purpose, "part": part.name, **figures})
        for index, question in enumerate(questions):
            if self._cancelled:
                raise CancelledError("labelling was cancelled")
            yield index, self._form.ask(question, Ballots(votes))

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        """Nothing is held."""

    def _post(self, questions: Sequence[Question], purpose: str) -> Part:
        items = []
        for question in questions:
            shown = [question.responses]
            if self._form.kind == "score":
                shown = [(response,) for response in question.responses]
            items += [item_of(question.prompt, responses)[0] for responses in shown]
        self._board.post_gold(self._gold)
        return self._board.post(purpose, items)

    def _waiting(self, purpose: str, round: int) -> str:
        options, waiting = self._board.options, self._board.still_to_do()
        noun = "pairs" if options.ask == "compare" else "answers"
        all_items = sum(len(part.items) for part in self._board.parts(purpose))
        ready = all_items - len(self._board.open_items())
        each = "verdict" if options.per_item == 1 else f"{options.per_item} verdicts"
        left = ", ".join(f"{name} {count}" for name, count in waiting.items() if count)
        return (
            f"Round {round} waits for people: {ready} of {all_items} {noun} have their {each}. "
            f"Left to do: {left}."
        )
