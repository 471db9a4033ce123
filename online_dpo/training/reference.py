"""Scoring with a frozen model: log-probs of given responses, for references, KL and canaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from online_dpo.errors import CorruptError
from online_dpo.training.batching import deal, sizes_of
from online_dpo.training.data import Pair
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.loss_modifiers import length_desensitized
from online_dpo.training.objective import Emit
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
        for part, values in scored_parts(
            model, [[s] for s in sequences], batch_tokens, accelerator, emit
        ):
            rows = part.rows(values)[part.index].cpu()  # (items, R)
            for item, row in zip(part.items, rows, strict=True):
                flat[offsets[item] : offsets[item + 1]] = row[: len(sequences[item][1])]
    logps = all_processes(flat, accelerator).tolist()
    return [logps[a:b] for a, b in pairwise(offsets)]


NUM_CHECKED = 16
"""Pairs on which the sampler's log-probs are compared with ours."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """A model's log-probs of n pairs, summed over response tokens: (n,) float64, in nats.

    `*_common` are the sums over as many tokens as both responses of the pair have. `mismatched` are
    of another pair's response after this one's prompt, where a loss asks for them.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_common: Tensor
    rejected_common: Tensor
    mismatched: Tensor | None = None

    def stacked(self, ld_alpha: float) -> Tensor:
        """(2, n), or (3, n) with `mismatched`; tokens beyond the common ones weighted (LD-DPO)."""
        whole = torch.stack([self.chosen, self.rejected])
        if ld_alpha != 1.0:
            common = torch.stack([self.chosen_common, self.rejected_common])
            whole = length_desensitized(whole, common, ld_alpha=ld_alpha)
        return whole if self.mismatched is None else torch.cat([whole, self.mismatched[None]])


def mismatched(pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
    """For each pair the chosen response of the next one that answers another prompt (KTO's z).

    Where all answer the same prompt, the next pair's.
    """
    found = []
    for index, pair in enumerate(pairs):
        others = (pairs[(index + shift) % len(pairs)] for shift in range(1, len(pairs)))
        first = pairs[(index + 1) % len(pairs)]
        found.append(next((o for o in others if o.prompt != pair.prompt), first).chosen)
    return found


@torch.no_grad()
def score_pairs(
    model: LogProbModel,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int,
    accelerator: Accelerator,
    emit: Emit,
    with_mismatched: bool = False,
) -> tuple[PairLogps, dict[str, Any]]:
    """The log-probs of pairs as in training, and no remarks; the processes share the work."""
    wanted = [[(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)] for pair in pairs]
    if with_mismatched:
        for pair, sequences, stranger in zip(pairs, wanted, mismatched(pairs), strict=True):
            sequences.append((pair.prompt, stranger))
    count = 3 if with_mismatched else 2
    sums = torch.zeros((count + 2, len(pairs)), dtype=torch.float64)
    for part, values in scored_parts(model, wanted, batch_tokens, accelerator, emit):
        lengths = part.sequence_lengths().unflatten(0, (count, -1))
        limits = lengths[:2].amin(dim=0).repeat(count)
        whole, common = part.sums(values), part.sums(values, limits=limits)
        both = [x.unflatten(0, (count, -1)) for x in (whole, common)]
        sums[:, list(part.items)] = torch.cat([both[0], both[1][:2]]).cpu()
    chosen, rejected, *third, chosen_common, rejected_common = all_processes(sums, accelerator)
    return PairLogps(chosen, rejected, chosen_common, rejected_common, *third), {}


def score_unsampled(
    model: LogProbModel,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int,
    accelerator: Accelerator,
    emit: Emit,
    with_mismatched: bool = False,
) -> tuple[PairLogps, dict[str, Any]]:
    """What the sampler gave where a pair has it, ours for the others, and how far these are apart.

    The difference is measured on some pairs that have both: in nats a response.
    """
    assert not with_mismatched
    given = [index for index, pair in enumerate(pairs) if pair.sampled_logps is not None]
    checked = given[:: max(1, len(given) // NUM_CHECKED)][:NUM_CHECKED]
    scored = [i for i, pair in enumerate(pairs) if pair.sampled_logps is None] + checked
    rest, _ = score_pairs(
        model,
        [pairs[index] for index in scored],
        batch_tokens=batch_tokens,
        accelerator=accelerator,
        emit=emit,
    )
    own = torch.stack([rest.chosen, rest.rejected])
    logps = torch.zeros((2, len(pairs)), dtype=torch.float64)
    logps[:, scored] = own
    logps[:, given] = torch.tensor([pairs[i].sampled_logps for i in given]).double().T
    apart = (logps[:, checked] - own[:, len(scored) - len(checked) :]).abs()
    unknown = torch.full_like(logps[0], torch.nan)
    remarks = {
        "pairs_from_sampler": len(given),
        "pairs_checked": len(checked),
        "sampled_max_error": float(apart.max()) if checked else None,
        "sampled_mean_error": float(apart.mean()) if checked else None,
    }
    return PairLogps(logps[0], logps[1], unknown, unknown), remarks


def write_reference_logps(path: Path, pairs: Sequence[Pair], logps: PairLogps) -> None:
    """One row a pair: pair_id, chosen_logp, rejected_logp, the common sums, mismatched_logp."""
    columns: dict[str, Any] = {"pair_id": pa.array([p.pair_id for p in pairs], pa.string())}
    for name, column in _COLUMNS.items():
        values = getattr(logps, name)
        if values is not None:
            columns[column] = pa.array(values.tolist(), pa.float64())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def read_reference_logps(path: Path, pairs: Sequence[Pair]) -> PairLogps:
    """What was written for these pairs, or for more.

    Raises CorruptError where a pair has none: the table belongs to other pairs.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing.") from error
    rows = {pair_id: row for row, pair_id in enumerate(table.column("pair_id").to_pylist())}
    missing = [pair.pair_id for pair in pairs if pair.pair_id not in rows]
    if missing:
        raise CorruptError(
            f"{path} holds no reference log-probs for {len(missing)} of {len(pairs)} pairs, e.g. "
            f"{missing[0]}: it was made for other pairs. Score the reference again."
        )
    order = torch.tensor([rows[pair.pair_id] for pair in pairs])
    values = {
        name: torch.from_numpy(table.column(column).to_numpy().copy())[order]
        for name, column in _COLUMNS.items()
        if column in table.column_names
    }
    return PairLogps(**values)


def scored_parts(
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


_COLUMNS = {
    "chosen": "chosen_logp",
    "rejected": "rejected_logp",
    "chosen_common": "chosen_common_logp",
    "rejected_common": "rejected_common_logp",
    "mismatched": "mismatched_logp",
}


def all_processes(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum over processes, each of which holds zeros where another one did the work."""
    if accelerator.num_processes == 1:
        return values
    reduced: Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()
    return reduced
