"""Which items an optimizer step takes, how they are dealt to processes, and how they are padded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
class Sequences:
    """Padded prompt + response rows, and where the response tokens are predicted.

    `input_ids` is (B, T), padded at the right. The N response tokens of all rows lie one after the
    other: `rows` and `positions` (N,) say where a token is predicted, `columns` (N,) its index in
    its response, `targets` (N,) which token it is.
    """

    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    columns: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Sequences:
        return Sequences(
            self.input_ids.to(device),
            self.rows.to(device),
            self.positions.to(device),
            self.columns.to(device),
            self.targets.to(device),
            self.lengths,
        )


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
    items: Sequence[int], lengths: Sequence[int], *, size: int, rank: int, num_processes: int
) -> list[MicroBatch]:
    """The micro-batches of one process, items of like length together.

    Every process gets the same number, because each takes part in every collective: where there
    are too few, the last is repeated and not counted.
    """
    ordered = sorted(items, key=lambda item: (lengths[item], item))
    size = min(size, math.ceil(len(ordered) / num_processes))
    batches = [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]
    each = math.ceil(len(batches) / num_processes)
    mine = [MicroBatch(batch, True) for batch in batches[rank::num_processes]]
    while len(mine) < each:
        mine.append(MicroBatch(batches[-1], False))
    return mine


def pad_sequences(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Sequences:
    """Rows of prompt + response. No prompt is empty: its end predicts the first token."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = np.zeros((len(prompts), width), dtype=np.int64)
    rows, positions, columns, targets = [], [], [], []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert len(prompt) > 0, "a response cannot be scored after an empty prompt"
        count = len(response)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : len(prompt) + count] = response
        rows.append(np.full(count, row))
        positions.append(np.arange(len(prompt) - 1, len(prompt) - 1 + count))
        columns.append(np.arange(count))
        targets.append(np.asarray(response, dtype=np.int64))
    return Sequences(
        torch.from_numpy(input_ids),
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(columns)),
        torch.from_numpy(np.concatenate(targets)),
        tuple(len(response) for response in responses),
    )
