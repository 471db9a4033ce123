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

from online_dpo.training.batching import deal, sizes_of
from online_dpo.training.data import Pair
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.loop import Emit
from online_dpo.training.packing import Part, TokenPair

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def score_sequences(
    model: LogProbModel,
    sequences: Sequence[TokenPair],
    *,
    batch_tokens: int,
    accelerator: Accelerator,
    emit: Emit,
) -> list[list[float]]:
    """Raw log-probs (nats, temperature 1) of each response token; the processes share the work."""
    offsets = [0]
    for _, response in sequences:
        offsets.append(offsets[-1] + len(response))
    flat = torch.zeros(offsets[-1], dtype=torch.float64)
    with model.full_precision():
        for part, values in _scored(
            model, [[s] for s in sequences], batch_tokens, accelerator, emit
        ):
            rows = part.rows(values)[part.index].cpu()  # (items, R)
            for item, row in zip(part.items, rows, strict=True):
                flat[offsets[item] : offsets[item + 1]] = row[: len(sequences[item][1])]
    logps = _all_processes(flat, accelerator).tolist()
    return [logps[a:b] for a, b in pairwise(offsets)]


@torch.no_grad()
def score_pairs(
    model: LogProbModel,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int,
    accelerator: Accelerator,
    emit: Emit,
) -> tuple[list[float], list[float]]:
    """(chosen, rejected) log-probs of each pair, summed over response tokens as in training."""
    wanted = [[(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)] for pair in pairs]
    sums = torch.zeros((2, len(pairs)), dtype=torch.float64)
    for part, values in _scored(model, wanted, batch_tokens, accelerator, emit):
        sums[:, list(part.items)] = part.sums(values).unflatten(0, (2, -1)).cpu()
    chosen, rejected = _all_processes(sums, accelerator).tolist()
    return chosen, rejected


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


def _scored(
    model: LogProbModel,
    wanted: Sequence[Sequence[TokenPair]],
    batch_tokens: int,
    accelerator: Accelerator,
    emit: Emit,
) -> Iterator[tuple[Part, Tensor]]:
    """The parts of this process's items, each with the log-probs of its response tokens."""
    if not wanted:
        return
    dealt = deal(
        range(len(wanted)),
        sizes_of(wanted),
        tokens=batch_tokens,
        most=None,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    for number, micro in enumerate(dealt, start=1):
        batch = model.pack(micro.items, [wanted[item] for item in micro.items])
        logps = model(batch)
        if micro.real:
            yield from ((part, logps[part.start : part.stop]) for part in batch.parts)
        if accelerator.is_main_process:
            emit({"event": "progress", "done": number, "of": len(dealt)})


def _all_processes(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum over processes, each of which holds zeros where another one did the work."""
    if accelerator.num_processes == 1:
        return values
    reduced: Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()
    return reduced
