"""Tokenized prompt sets as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from online_dpo.records import to_dict
from online_dpo.tokenization import Problem, SourcedPrompt
from online_dpo.training.checkpoints import write_jsonl

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("role", pa.string()),
        ("weight", pa.float64()),
        ("text", pa.string()),
        ("messages", pa.string()),
        ("metadata", pa.string()),
        ("token_ids", pa.list_(pa.int64())),
    ]
)
"""Messages and metadata are JSON texts."""


def write_prompts(out: Path, prompts: Sequence[SourcedPrompt], problems: Sequence[Problem]) -> None:
    """Write `prompts.parquet`, and `problems.jsonl` with the rows that were skipped."""
    rows = [
        {
            "id": sourced.prompt.id,
            "source": sourced.prompt.source,
            "role": sourced.role,
            "weight": sourced.weight,
            "text": sourced.prompt.text,
            "messages": json.dumps([to_dict(m) for m in sourced.prompt.messages]),
            "metadata": json.dumps(sourced.prompt.metadata, default=str),
            "token_ids": sourced.prompt.token_ids,
        }
        for sourced in prompts
    ]
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out / "prompts.parquet")
    write_jsonl(out / "problems.jsonl", [asdict(problem) for problem in problems])
