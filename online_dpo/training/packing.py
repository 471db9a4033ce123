"""Sequences of one forward pass, laid out without padding and with each prompt encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TokenPair = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, response ids)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a batch that is projected to the vocabulary at once: whole items.

    Its n response tokens are those of its U distinct responses, one after the other; `owners` (n,)
    says which response a token belongs to, `columns` (n,) its index there. `index` (S,) names the
    response of each sequence that the items asked for, in their order.
    """

    items: tuple[int, ...]
    start: int
    stop: int
    owners: Tensor
    columns: Tensor
    index: Tensor
    lengths: tuple[int, ...]

    def sums(self, values: Tensor, *, limits: Tensor | None = None) -> Tensor:
        """(S,) float64 sums of `values` (n,) over the tokens of each sequence asked for.

        `limits` (S,) counts the first tokens of each to sum. A sum of some hundred nats has few
        digits left in float32, and margins are differences of sums.
        """
        rows = self.rows(values)
        if limits is None:
            return rows.sum(dim=1)[self.index]
        counted = torch.arange(rows.shape[1], device=rows.device) < limits[:, None]
        return (rows[self.index] * counted).sum(dim=1)

    def rows(self, values: Tensor) -> Tensor:
        """(U, R) float64: `values` (n,) by response, zeros at the right."""
        padded = values.new_zeros((len(self.lengths), max(self.lengths)), dtype=torch.float64)
        # An index occurs once, so that this is deterministic on a GPU too.
        return padded.index_put((self.owners, self.columns), values.double())

    def sequence_lengths(self) -> Tensor:
        """(S,) response tokens of each sequence asked for."""
        return torch.tensor(self.lengths, device=self.index.device)[self.index]


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which tokens of a packed row see which: each response its prompt and its own past.

    G groups of a prompt with up to K responses, Pmax and Rmax tokens long. `prompts` (G, Pmax) and
    `responses` (G, K, Rmax) are indices into the row's T tokens; `inverse` (T,) is the place of
    each token among the G * Pmax + G * K * Rmax of both. `prompt_padding` (G, Pmax) and
    `response_padding` (G, K, Rmax) are true where an index stands for no token, and names the
    row's first; None where there is no padding.
    """

    prompts: Tensor
    responses: Tensor
    inverse: Tensor
    prompt_padding: Tensor | None
    response_padding: Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes: rows of tokens, and where responses are predicted.

    `input_ids` and `position_ids` are (B, T): one row without padding where prompts are shared,
    else a row a sequence, padded at the right. The N response tokens of all parts lie one after
    the other: `positions` (N,) is where in the flattened B * T a token is predicted, `targets`
    (N,) which it is.
    """

    input_ids: Tensor
    position_ids: Tensor
    positions: Tensor
    targets: Tensor
    parts: tuple[Part, ...]
    sharing: Sharing | None


Pack = Callable[[Sequence[int], Sequence[Sequence[TokenPair]]], Batch]
"""Makes the batch of items from what is scored of each."""


@dataclass(slots=True)
class _Group:
    """A prompt with its distinct responses, and the items that want them."""

    prompt: Sequence[int]
    responses: dict[tuple[int, ...], int]
    items: list[int]
    index: list[list[int]]


def pack(
    items: Sequence[int],
    sequences: Sequence[Sequence[TokenPair]],
    *,
    shared: bool,
    part_tokens: int,
    device: torch.device,
) -> Batch:
    """The batch of `items`, each of which asks for some sequences of one prompt.

    `shared` lays all sequences of a prompt out as prompt, response, response, ...; otherwise each
    response stands in a row of its own behind its prompt. A part has at most `part_tokens`
    response tokens, or one prompt's. Every item asks for equally many sequences. No prompt is
    empty: its end predicts the first token.
    """
    groups = _group(items, sequences)
    parts = _parts(groups, part_tokens)
    rows = _shared_row(groups) if shared else _padded_rows(groups)
    targets = [np.asarray(r, dtype=np.int64) for g in groups for r in g.responses]
    move = _Mover(device)
    return Batch(
        input_ids=move(rows.input_ids),
        position_ids=move(rows.position_ids),
        positions=move(np.concatenate(rows.positions)),
        targets=move(np.concatenate(targets)),
        parts=tuple(move.part(part) for part in parts),
        sharing=_sharing(groups, move) if shared else None,
    )


def _group(items: Sequence[int], sequences: Sequence[Sequence[TokenPair]]) -> list[_Group]:
    groups: dict[tuple[int, ...], _Group] = {}
    for item, wanted in zip(items, sequences, strict=True):
        prompt = wanted[0][0]
        assert len(prompt) > 0, "a response cannot be scored after an empty prompt"
        group = groups.setdefault(tuple(prompt), _Group(prompt, {}, [], []))
        group.items.append(item)
        group.index.append(
            [
                group.responses.setdefault(tuple(response), len(group.responses))
                for _, response in wanted
            ]
        )
    return list(groups.values())


def _parts(groups: Sequence[_Group], part_tokens: int) -> list[list[_Group]]:
    parts: list[list[_Group]] = []
    room = 0
    for group in groups:
        tokens = sum(map(len, group.responses))
        if not parts or tokens > room:
            parts.append([])
            room = part_tokens
        parts[-1].append(group)
        room -= tokens
    return parts


@dataclass(frozen=True, slots=True)
class _Rows:
    input_ids: Any
    position_ids: Any
    positions: list[Any]


def _shared_row(groups: Sequence[_Group]) -> _Rows:
    ids, places, positions = [], [], []
    start = 0
    for group in groups:
        length = len(group.prompt)
        ids.append(np.asarray(group.prompt, dtype=np.int64))
        places.append(np.arange(length))
        last = start + length - 1  # predicts the first token of every response
        start += length
        for response in group.responses:
            count = len(response)
            ids.append(np.asarray(response, dtype=np.int64))
            places.append(np.arange(length, length + count))
            at = np.arange(start - 1, start - 1 + count)
            at[:1] = last
            positions.append(at)
            start += count
    return _Rows(np.concatenate(ids)[None], np.concatenate(places)[None], positions)


def _padded_rows(groups: Sequence[_Group]) -> _Rows:
    rows = [(group.prompt, response) for group in groups for response in group.responses]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = []
    for row, (prompt, response) in enumerate(rows):
        start, count = len(prompt), len(response)
        input_ids[row, :start] = prompt
        input_ids[row, start : start + count] = response
        positions.append(row * width + np.arange(start - 1, start - 1 + count))
    return _Rows(input_ids, np.tile(np.arange(width), (len(rows), 1)), positions)


def _sharing(groups: Sequence[_Group], move: _Mover) -> Sharing:
    longest_prompt = max(len(group.prompt) for group in groups)
    most = max(len(group.responses) for group in groups)
    longest = max(len(response) for group in groups for response in group.responses)
    prompts = np.full((len(groups), longest_prompt), -1, dtype=np.int64)
    responses = np.full((len(groups), most, longest), -1, dtype=np.int64)
    inverse, start = [], 0
    for g, group in enumerate(groups):
        count = len(group.prompt)
        prompts[g, :count] = np.arange(start, start + count)
        inverse.append(g * longest_prompt + np.arange(count))
        start += count
        for k, response in enumerate(group.responses):
            count = len(response)
            responses[g, k, :count] = np.arange(start, start + count)
            inverse.append(prompts.size + (g * most + k) * longest + np.arange(count))
            start += count
    return Sharing(
        prompts=move(prompts.clip(0)),
        responses=move(responses.clip(0)),
        inverse=move(np.concatenate(inverse)),
        prompt_padding=move(prompts < 0) if (prompts < 0).any() else None,
        response_padding=move(responses < 0) if (responses < 0).any() else None,
    )


class _Mover:
    """Arrays to tensors on a device; parts know where their tokens begin."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reached = 0

    def __call__(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def part(self, groups: Sequence[_Group]) -> Part:
        lengths = tuple(len(response) for group in groups for response in group.responses)
        offsets = np.cumsum([0, *(len(group.responses) for group in groups)])
        index = [
            np.asarray(wanted, dtype=np.int64) + offset
            for group, offset in zip(groups, offsets[:-1], strict=True)
            for wanted in group.index
        ]
        start, self._reached = self._reached, self._reached + sum(lengths)
        return Part(
            items=tuple(item for group in groups for item in group.items),
            start=start,
            stop=self._reached,
            owners=self(np.repeat(np.arange(len(lengths)), lengths)),
            columns=self(np.concatenate([np.arange(n) for n in lengths])),
            # (sequences an item, items): all first sequences, then all second ones, ...
            index=self(np.stack(index, axis=1).reshape(-1)),
            lengths=lengths,
        )
