"""Which items an optimizer step takes, and how they are dealt to processes and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from online_dpo.training.packing import TokenPair


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: the items it takes, and the number of samples seen before it."""

    items: tuple[int, ...]
    cursor: int
    epoch: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Items of one forward pass. `real` is False for a repeat that only keeps processes in step."""

    items: tuple[int, ...]
    real: bool


@dataclass(frozen=True, slots=True)
class Size:
    """What an item puts into a batch: its prompt, once for all items of its group, and responses.

    Items of a group share their prompt.
    """

    group: int
    prompt_tokens: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens


def sizes_of(sequences: Sequence[Sequence[TokenPair]]) -> list[Size]:
    """The sizes of items, each of which asks for some sequences of one prompt."""
    groups: dict[tuple[int, ...], int] = {}
    return [
        Size(
            groups.setdefault(tuple(wanted[0][0]), len(groups)),
            len(wanted[0][0]),
            sum(len(response) for _, response in wanted),
        )
        for wanted in sequences
    ]


def plan_steps(num_items: int, *, batch_size: int, epochs: float, seed: int) -> list[Step]:
    """Every step of a training run, in order: a seeded permutation for each epoch.

    A batch never crosses an epoch's end, and a smaller last one is kept. A fraction of an epoch
    takes that share of its items, rounded up.
    """
    steps: list[Step] = []
    cursor = 0
    for epoch in range(math.ceil(epochs)):
        order = np.random.default_rng([seed, epoch]).permutation(num_items)
        share = min(1.0, epochs - epoch)
        order = order[: max(1, math.ceil(share * num_items - 1e-9))]
        for begin in range(0, len(order), batch_size):
            items = tuple(int(i) for i in order[begin : begin + batch_size])
            steps.append(Step(items, cursor, epoch))
            cursor += len(items)
    return steps


def deal(
    items: Sequence[int],
    sizes: Sequence[Size],
    *,
    tokens: int,
    most: int | None,
    rank: int,
    num_processes: int,
) -> list[MicroBatch]:
    """The micro-batches of one process, items of a prompt together, then items of like length.

    A micro-batch has at most `tokens` tokens, each prompt counted once, unless one item is longer,
    and at most `most` items. Every process gets the same number, because each takes part in every
    collective: where there are too few, the last is repeated and not counted.
    """
    longest: dict[int, int] = {}
    for item in items:
        size = sizes[item]
        longest[size.group] = max(longest.get(size.group, 0), size.tokens)
    ordered = sorted(items, key=lambda i: (longest[sizes[i].group], sizes[i].group, i))
    batches = _even(ordered, sizes, tokens, most, num_processes)
    each = math.ceil(len(batches) / num_processes)
    mine = [MicroBatch(batch, True) for batch in batches[rank::num_processes]]
    while len(mine) < each:
        mine.append(MicroBatch(batches[-1], False))
    return mine


def _even(
    ordered: Sequence[int],
    sizes: Sequence[Size],
    tokens: int,
    most: int | None,
    num_processes: int,
) -> list[tuple[int, ...]]:
    """As few micro-batches as fit, and of like cost where several processes wait for each other."""
    most = min(most or len(ordered), math.ceil(len(ordered) / num_processes))
    if num_processes == 1:
        return _fill(ordered, sizes, tokens, most)
    rounds = math.ceil(len(_fill(ordered, sizes, tokens, most)) / num_processes)
    limit = sum(sizes[i].tokens for i in ordered) // (rounds * num_processes)
    while limit < tokens:
        batches = _fill(ordered, sizes, limit, most)
        if len(batches) <= rounds * num_processes:
            return batches
        limit += limit // 8 + 1
    return _fill(ordered, sizes, tokens, most)


def _fill(
    ordered: Sequence[int], sizes: Sequence[Size], tokens: int, most: int
) -> list[tuple[int, ...]]:
    batches: list[list[int]] = []
    room, group = 0, -1
    for item in ordered:
        size = sizes[item]
        cost = size.response_tokens if size.group == group and batches else size.tokens
        if not batches or cost > room or len(batches[-1]) == most:
            batches.append([])
            room, cost = tokens, size.tokens
        batches[-1].append(item)
        room, group = room - cost, size.group
    return [tuple(batch) for batch in batches]
