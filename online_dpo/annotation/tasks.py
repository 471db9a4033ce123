"""Which annotator is shown what, in which order and which way round: drawn by seed; pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from online_dpo.annotation.items import Item
from online_dpo.annotation.options import PeopleOptions
from online_dpo.records import derive_seed

Purpose = Literal["item", "repeat", "gold"]
"""item: counts towards a label; repeat and gold measure the annotator."""

Choice = Literal["a", "b", "tie", "good", "bad", "skip"]
CHOICES: dict[str, tuple[Choice, ...]] = {
    "compare": ("a", "b", "tie", "skip"),
    "rate": ("good", "bad", "skip"),
}
"""What may be said, by what is asked."""

REPEAT_AFTER = 10
"""Items of the annotator between an item and its repeat, where there are as many."""

_VALUES: dict[Choice, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, "good": 1.0, "bad": 0.0}


@dataclass(frozen=True)
class Task:
    """An item as one annotator is shown it. `swapped`: the item's second answer stands first.

    `id` tells nothing of the purpose.
    """

    id: str
    batch: str
    annotator: str
    item: Item
    purpose: Purpose
    swapped: bool

    def value(self, choice: Choice) -> float | None:
        """The item's value that a choice amounts to; None for skip."""
        value = _VALUES.get(choice)
        return None if value is None else 1.0 - value if self.swapped else value


def assigned(item: Item, options: PeopleOptions, seed: int) -> tuple[str, ...]:
    """The annotators of an item. One who joins or leaves changes nothing among the others."""
    order = sorted(options.annotators, key=lambda name: derive_seed(seed, "who", item.id, name))
    return tuple(order[: options.per_item])


def tasks_of(
    annotator: str,
    parts: Sequence[Sequence[Item]],
    gold: Sequence[Item],
    options: PeopleOptions,
    *,
    batch: str,
    seed: int,
) -> list[Task]:
    """What an annotator is shown of a batch (a round's items), in order.

    Parts keep their order, for later ones to change nothing before them; items are shuffled within.
    """
    own = [
        item
        for part in parts
        for item in _shuffled(part, seed, "order", annotator)
        if annotator in assigned(item, options, seed)
    ]
    placed = [*_placed(own, options, seed, annotator), *_gold(own, gold, options, seed, annotator)]
    placed.sort(key=lambda entry: entry[0])
    return [
        make_task(annotator, item, purpose, batch=batch, seed=seed) for _, item, purpose in placed
    ]


def make_task(annotator: str, item: Item, purpose: Purpose, *, batch: str, seed: int) -> Task:
    """One annotator's task; a repeat is shown the other way round than the item was."""
    drawn = bool(derive_seed(seed, "shown", annotator, item.id) & 1)
    swapped = len(item.answers) == 2 and drawn != (purpose == "repeat")
    # A verdict on an item holds in every round; what measures an annotator is asked anew.
    where = "" if purpose == "item" else batch
    key = "\0".join((annotator, purpose, where, item.id))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Task(name, batch, annotator, item, purpose, swapped)


_Placed = tuple[tuple[float, int], Item, Purpose]


def _placed(
    own: Sequence[Item], options: PeopleOptions, seed: int, annotator: str
) -> Iterator[_Placed]:
    for place, item in enumerate(own):
        yield (place, 0), item, "item"
        if derive_seed(seed, "repeat", annotator, item.id) / 2**63 < options.repeats:
            yield (place + REPEAT_AFTER, 1), item, "repeat"


def _gold(
    own: Sequence[Item], gold: Sequence[Item], options: PeopleOptions, seed: int, annotator: str
) -> Iterator[_Placed]:
    """Gold items spread evenly over the annotator's own, each at most once."""
    if options.gold_share == 0.0:
        return
    for number, item in enumerate(_shuffled(gold, seed, "gold", annotator)):
        place = (number + 0.5) / options.gold_share
        if place >= len(own):
            return
        yield (place, 2), item, "gold"


def _shuffled(items: Sequence[Item], seed: int, *parts: str) -> list[Item]:
    return sorted(items, key=lambda item: derive_seed(seed, *parts, item.id))
