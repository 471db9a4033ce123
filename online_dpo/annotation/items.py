"""One thing that people label: a prompt with one answer or two, under an id of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from online_dpo.errors import ConfigError
from online_dpo.offline.preference_forms import UnusableError, parse_preference
from online_dpo.records import Message, Prompt, Response
from online_dpo.resources import find_data
from online_dpo.rows import read_rows
from online_dpo.tokenization import parse_prompt

RUBRIC_FIELD = "rubric"
"""The field of a prompt's metadata that is shown with it."""


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """An answer as people see it."""

    text: str
    cut_off: bool = False


@dataclass(frozen=True)
class Item:
    """What people are asked: which of two answers is better, or whether one is good.

    Two answers stand in an order of their content, which says nothing of where they come from. A
    verdict's value is 1 where the first is better (or the only one good), 0.5 for a tie, 0
    otherwise. `gold` is the known value, for items that measure annotators.
    """

    messages: tuple[Message, ...]
    answers: tuple[ShownAnswer, ...]
    rubric: str = ""
    gold: float | None = None

    @cached_property
    def id(self) -> str:
        """16 hex digits over all that is shown."""
        shown = {k: v for k, v in asdict(self).items() if k != "gold"}
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def item_of(prompt: Prompt, responses: Sequence[Response]) -> tuple[Item, bool]:
    """The item of one response or two, and whether it has them in the reverse of this order."""
    shown = [ShownAnswer(response.text, response.truncated) for response in responses]
    rubric = prompt.metadata.get(RUBRIC_FIELD)
    answers = tuple(sorted(shown, key=lambda answer: (answer.text, answer.cut_off)))
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    item = Item(messages, answers, rubric if isinstance(rubric, str) else "")
    return item, answers != tuple(shown)


def to_row(item: Item) -> dict[str, Any]:
    """An item as plain JSON types, with its id."""
    return {"id": item.id, **asdict(item)}


def from_row(row: Mapping[str, Any]) -> Item:
    """The inverse of `to_row`. Raises ValueError where the content is not that of the id."""
    item = Item(
        tuple(Message(m["role"], m["content"]) for m in row["messages"]),
        tuple(ShownAnswer(a["text"], a["cut_off"]) for a in row["answers"]),
        row["rubric"],
        row["gold"],
    )
    if item.id != row["id"]:
        raise ValueError(f"item {row['id']} has another content")
    return item


def read_gold(path: str, ask: str) -> list[Item]:
    """The gold items of a file: prompt, chosen, rejected; or prompt, completion, label.

    Raises ConfigError naming the first row that is no such item.
    """
    read = _gold_pair if ask == "compare" else _gold_answer
    items = []
    for row in read_rows(str(find_data(path))):
        try:
            if row.values is None:
                raise UnusableError(row.problem)
            items.append(read(row.values))
        except UnusableError as error:
            raise ConfigError(f"judge.options.gold: {path}:{row.line}: {error}.") from None
    if not items:
        raise ConfigError(f"judge.options.gold: {path} has no rows.")
    return items


def _gold_pair(values: Mapping[str, Any]) -> Item:
    stated = parse_preference(values)
    if stated.chosen == stated.rejected:
        raise UnusableError("chosen and rejected are equal")
    chosen, rejected = ShownAnswer(stated.chosen), ShownAnswer(stated.rejected)
    messages = stated.messages or (Message("user", stated.text or ""),)
    if stated.chosen < stated.rejected:
        return Item(messages, (chosen, rejected), gold=1.0)
    return Item(messages, (rejected, chosen), gold=0.0)


def _gold_answer(values: Mapping[str, Any]) -> Item:
    completion, label = values.get("completion"), values.get("label")
    if not isinstance(completion, str) or not isinstance(label, bool):
        raise UnusableError("needs a text `completion` and a `label` of true or false")
    text, messages, reason = parse_prompt(values.get("prompt"))
    if reason:
        raise UnusableError(reason)
    shown = messages or (Message("user", text or ""),)
    return Item(shown, (ShownAnswer(completion),), gold=float(label))
