"""Good and bad responses as training reads them, and the reference's log-probs of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from online_dpo.errors import CorruptError, NoPairsError
from online_dpo.training.data import Limit, Skipped
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.objective import Emit
from online_dpo.training.packing import TokenPair
from online_dpo.training.reference import all_processes, scored_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

UNPAIRED_FILE = "unpaired.parquet"
"""A table of this name holds unpaired rows; of any other, pairs."""

_COLUMNS = ["row_id", "prompt_token_ids", "completion_token_ids", "label"]
_LOGPS = ["completion_logp", "mismatched_logp"]


@dataclass(frozen=True, slots=True)
class Example:
    """A response that is good or bad by itself."""

    row_id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    good: bool


def read_unpaired(path: Path, limit: Limit) -> tuple[list[Example], Skipped]:
    """The rows that fit, in the file's order. Raises NoPairsError where none is left."""
    examples, skipped = [], Skipped()
    for row in _table(path, _COLUMNS).to_pylist():
        prompt, completion = tuple(row["prompt_token_ids"]), tuple(row["completion_token_ids"])
        if not (prompt and completion):
            skipped.add("no prompt tokens or no response tokens", row["row_id"])
        elif limit.exceeded_by(len(prompt) + len(completion)):
            skipped.add(limit.reason, row["row_id"])
        else:
            examples.append(Example(row["row_id"], prompt, completion, row["label"]))
    if not examples:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in skipped.counts.items())
        raise NoPairsError(f"No row of {path} can be trained on: {reasons or 'it has none'}.")
    return examples, skipped


def mismatched(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """For each example a response to another prompt (for KTO's z): one place further on for each
    example of its own prompt, so that neighbours get different ones.

    Where all answer the same prompt, the next example's.
    """
    per_prompt = Counter(example.prompt for example in examples)
    found = []
    for index, example in enumerate(examples):
        shifts = range(per_prompt[example.prompt], per_prompt[example.prompt] + len(examples))
        others = (examples[(index + shift) % len(examples)] for shift in shifts)
        following = examples[(index + 1) % len(examples)]
        other = next((o for o in others if o.prompt != example.prompt), following)
        found.append(other.completion)
    return found


def with_mismatched(examples: Sequence[Example]) -> list[tuple[TokenPair, TokenPair]]:
    """What is scored of each example: its own response, and another prompt's, after its prompt."""
    return [
        ((example.prompt, example.completion), (example.prompt, stranger))
        for example, stranger in zip(examples, mismatched(examples), strict=True)
    ]


@torch.no_grad()
def score_unpaired(
    model: LogProbModel,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    accelerator: Accelerator,
    emit: Emit,
) -> Tensor:
    """(2, n) float64 log-probs of `with_mismatched`, in nats; the processes share the work."""
    sums = torch.zeros((2, len(examples)), dtype=torch.float64)
    wanted = with_mismatched(examples)
    for part, values in scored_parts(model, wanted, batch_tokens, accelerator, emit):
        sums[:, list(part.items)] = part.sums(values).unflatten(0, (2, -1)).double().cpu()
    return all_processes(sums, accelerator)


def write_unpaired_logps(path: Path, examples: Sequence[Example], logps: Tensor) -> None:
    """One row an example: row_id, completion_logp, mismatched_logp."""
    columns = {name: pa.array(row.tolist()) for name, row in zip(_LOGPS, logps, strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = pa.array([example.row_id for example in examples], pa.string())
    pq.write_table(pa.table({"row_id": ids, **columns}), path)


def read_unpaired_logps(path: Path, examples: Sequence[Example]) -> Tensor:
    """(2, n) of what was written. Raises CorruptError where it was for other rows."""
    table = _table(path, ["row_id", *_LOGPS])
    if table.column("row_id").to_pylist() != [example.row_id for example in examples]:
        raise CorruptError(
            f"{path} was made for other rows than those trained on. Score the reference again."
        )
    return torch.tensor([table.column(name).to_pylist() for name in _LOGPS], dtype=torch.float64)


def _table(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing.") from error
