"""Parquet tables from and to lists of plain rows, with the same bytes for the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.errors import CorruptError
from online_dpo.records import (
    Preference,
    Prompt,
    Response,
    Unpaired,
    prompt_from_dict,
    response_from_dict,
)

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]

_COLUMNS: dict[str, dict[str, str]] = {
    "prompts": {
        "id": "string",
        "source": "string",
        "role": "string",
        "weight": "float64",
        "text": "string",
        "messages": "string",
        "metadata": "string",
        "token_ids": "ids",
    },
    "samples": {
        "id": "string",
        "prompt_id": "string",
        "prompt_source": "string",
        "text": "string",
        "token_ids": "ids",
        "finish_reason": "string",
        "source": "string",
        "logprobs": "floats",
    },
    "scores": {
        "response_id": "string",
        "reference_logp": "float64",
    },
    "labels": {
        "prompt_id": "string",
        "prompt_source": "string",
        "first_id": "string",
        "second_id": "string",
        "score": "float64",
        "p": "float64",
        "reason": "string",
        "orders": "int64",
        "raws": "strings",
        "order_ps": "doubles",
        "vote_ps": "doubles",
    },
    "checks": {
        "part": "string",
        "prompt_id": "string",
        "prompt_text": "string",
        "first_id": "string",
        "second_id": "string",
        "first_text": "string",
        "second_text": "string",
        "gold": "float64",
        "p": "float64",
        "reason": "string",
        "orders": "int64",
        "raws": "strings",
        "order_ps": "doubles",
        "vote_ps": "doubles",
    },
    "pairs": {
        "pair_id": "string",
        "prompt_id": "string",
        "prompt_source": "string",
        "prompt_token_ids": "ids",
        "chosen_id": "string",
        "rejected_id": "string",
        "chosen_token_ids": "ids",
        "rejected_token_ids": "ids",
        "chosen_text": "string",
        "rejected_text": "string",
        "chosen_truncated": "bool",
        "rejected_truncated": "bool",
        "margin": "float64",
        "p": "float64",
        "origin": "string",
        "chosen_sampled_logp": "float64",
        "rejected_sampled_logp": "float64",
    },
    "unpaired": {
        "row_id": "string",
        "prompt_id": "string",
        "prompt_source": "string",
        "prompt_token_ids": "ids",
        "completion_id": "string",
        "completion_token_ids": "ids",
        "completion_text": "string",
        "completion_truncated": "bool",
        "label": "bool",
        "margin": "float64",
        "origin": "string",
    },
    "answers": {
        "prompt_id": "string",
        "prompt_source": "string",
        "response_id": "string",
        "prompt_text": "string",
        "text": "string",
        "token_ids": "ids",
        "finish_reason": "string",
        "score": "float64",
        "reason": "string",
        "p_previous": "float64",
        "p_policy0": "float64",
    },
    "rescored": {
        "prompt_id": "string",
        "score": "float64",
        "reason": "string",
    },
}
"""The columns of every table of a run, by kind."""


def _schema(kind: str) -> pa.Schema:
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "float64": pa.float64(),
        "int64": pa.int64(),
        "bool": pa.bool_(),
        "ids": pa.list_(pa.int32()),
        "floats": pa.list_(pa.float32()),
        "doubles": pa.list_(pa.float64()),
        "strings": pa.list_(pa.string()),
    }
    return pa.schema([(name, types[kind]) for name, kind in _COLUMNS[kind].items()])


def write_table(path: Path, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as the parquet table of a kind ("prompts", "samples", "labels", ...)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(kind)
    columns = {name: [row[name] for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def read_table(path: Path) -> list[Row]:
    """All rows of a parquet table, in order. Raises CorruptError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise CorruptError(f"{path} is no parquet table: {error}") from error
    return rows


def prompt_row(prompt: Prompt, *, role: str, weight: float) -> Row:
    """A prompt as a row of the prompts table."""
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    return {
        "id": prompt.id,
        "source": prompt.source,
        "role": role,
        "weight": weight,
        "text": prompt.text,
        "messages": json.dumps(messages, ensure_ascii=False),
        "metadata": json.dumps(dict(prompt.metadata), ensure_ascii=False, sort_keys=True),
        "token_ids": list(prompt.token_ids),
    }


def prompt_from_row(row: Row) -> Prompt:
    """The inverse of `prompt_row`."""
    return prompt_from_dict(
        {
            **row,
            "messages": json.loads(row["messages"] or "[]"),
            "metadata": json.loads(row["metadata"] or "{}"),
        }
    )


def responses_by_prompt(rows: Iterable[Row]) -> dict[str, list[Response]]:
    """Samples grouped by prompt id, in table order."""
    groups: dict[str, list[Response]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(response_from_dict(row))
    return groups


def preference_from_row(row: Row) -> Preference:
    """A row of the pairs table as a record."""
    ids = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return Preference(**{**row, **{name: tuple(row[name]) for name in ids}})


def unpaired_from_row(row: Row) -> Unpaired:
    """A row of the unpaired table as a record."""
    ids = ("prompt_token_ids", "completion_token_ids")
    return Unpaired(**{**row, **{name: tuple(row[name]) for name in ids}})


def response_from_answer(row: Row) -> Response:
    """An answer of an evaluation as the response it was."""
    return Response(
        id=row["response_id"],
        prompt_id=row["prompt_id"],
        text=row["text"],
        token_ids=tuple(row["token_ids"]),
        finish_reason=row["finish_reason"],
    )
