"""Scoring with a frozen model: log-probs of given responses, for references, KL and canaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from online_dpo.training.batching import Sequences, deal, pad_sequences
from online_dpo.training.data import Pair
from online_dpo.training.logprobs import LogProbModel, sum_rows, token_logps
from online_dpo.training.loop import Emit

if TYPE_CHECKING:
    from accelerate import Accelerator

TokenPair = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, response ids)."""


@torch.no_grad()
def score_sequences(
    model: LogProbModel,
    sequences: Sequence[TokenPair],
    *,
    batch_size: int,
    accelerator: Accelerator,
    emit: Emit,
) -> list[list[float]]:
    """Raw log-probs (nats, temperature 1) of each response token; the processes share the work."""
    offsets = [0]
    for _, response in sequences:
        offsets.append(offsets[-1] + len(response))
    flat = torch.zeros(offsets[-1], dtype=torch.float64)
    with model.full_precision():
        for items, batch in _batches(model, sequences, batch_size, accelerator, emit):
            values = token_logps(model, batch).double().cpu()
            for item, part in zip(items, torch.split(values, list(batch.lengths)), strict=True):
                flat[offsets[item] : offsets[item + 1]] = part
    logps = _all_processes(flat, accelerator).tolist()
    return [logps[a:b] for a, b in pairwise(offsets)]


@torch.no_grad()
def score_pairs(
    model: LogProbModel,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    accelerator: Accelerator,
    emit: Emit,
) -> tuple[list[float], list[float]]:
    """(chosen, rejected) log-probs of each pair, summed over response tokens as in training."""
    sequences: list[TokenPair] = [(pair.prompt, pair.chosen) for pair in pairs]
    sequences += [(pair.prompt, pair.rejected) for pair in pairs]
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    for items, batch in _batches(model, sequences, batch_size, accelerator, emit):
        sums[list(items)] = sum_rows(token_logps(model, batch), batch).cpu()
    values = _all_processes(sums, accelerator).tolist()
    return values[: len(pairs)], values[len(pairs) :]


def write_reference_logps(
    path: Path, pairs: Sequence[Pair], chosen: Sequence[float], rejected: Sequence[float]
) -> None:
    """One row a pair: pair_id, chosen_logp, rejected_logp."""
    table = pa.table(
        {
            "pair_id": pa.array([pair.pair_id for pair in pairs], pa.string()),
            "chosen_logp": pa.array(chosen, pa.float64()),
            "rejected_logp": pa.array(rejected, pa.float64()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _batches(
    model: LogProbModel,
    sequences: Sequence[TokenPair],
    batch_size: int,
    accelerator: Accelerator,
    emit: Emit,
) -> Iterator[tuple[tuple[int, ...], Sequences]]:
    """This process's items with their padded batches on the device, like lengths together."""
    if not sequences:
        return
    dealt = deal(
        range(len(sequences)),
        [len(prompt) + len(response) for prompt, response in sequences],
        size=batch_size,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    for number, micro in enumerate(dealt, start=1):
        if not micro.real:
            continue
        prompts = [sequences[item][0] for item in micro.items]
        responses = [sequences[item][1] for item in micro.items]
        yield micro.items, pad_sequences(prompts, responses).to(model.device)
        if accelerator.is_main_process:
            emit({"event": "progress", "done": number, "of": len(dealt)})


def _all_processes(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum over processes, each of which holds zeros where another one did the work."""
    if accelerator.num_processes == 1:
        return values
    reduced: Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()
    return reduced
