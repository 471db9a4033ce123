"""The rows of a data file or dataset, with their line numbers and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo import strict_json
from online_dpo.errors import ConfigError
from online_dpo.resources import is_row_file


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a data file; `line` counts from 1 the lines, or the rows where there are no lines.
    `values` is None where it cannot be read.
    """

    line: int
    values: Mapping[str, Any] | None
    problem: str = ""
    excerpt: str = ""


def read_rows(path: str, *, split: str = "train") -> Iterator[Row]:
    """The rows of a .jsonl, .json or .parquet file, or of a dataset that `datasets` loads by name.

    A .json file holds one array of rows, or a row a line.

    Raises ConfigError where there is no such file or dataset, or it cannot be read.
    """
    suffix = Path(path).suffix
    if is_row_file(path) and not Path(path).is_file():
        raise ConfigError(f"The file {path} does not exist.")
    if suffix in (".jsonl", ".json"):
        yield from _read_jsonl(Path(path))
        return
    rows = _read_parquet(Path(path)) if suffix == ".parquet" else _read_dataset(path, split)
    for line, values in enumerate(rows, start=1):
        yield Row(line, values)


def excerpt(value: Any) -> str:
    """At most 120 characters of a value, on one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:119] + "…"


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages: "a number", "a list", ..."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    for kind, name in ((str, "a string"), (list, "a list"), (dict, "an object")):
        if isinstance(value, kind):
            return name
    return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if path.suffix == ".json" and data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_array(path, data)
        return
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            # A file may begin with a byte order mark.
            values = strict_json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            if b"\\u" in raw:
                json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield Row(line, None, "half of a surrogate pair, which is no text", excerpt(str(raw)))
            continue
        except ValueError as error:
            shown = excerpt(raw.decode("utf-8", errors="replace"))
            yield Row(line, None, f"not JSON: {error}", shown)
            continue
        yield _row(line, values)


def _read_array(path: Path, data: bytes) -> Iterator[Row]:
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path} begins as an array and is not JSON: {error}") from error
    for number, values in enumerate(rows, start=1):
        yield _row(number, values)


def _row(line: int, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(line, values)
    return Row(line, None, f"the line is {kind_of(values)}, not an object", excerpt(values))


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {error}") from error


def _read_dataset(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise ConfigError(
            f"The dataset {name!r} (split {split!r}) cannot be loaded: {error} "
            "A local file is named by a path that ends in .jsonl or .parquet."
        ) from error
    yield from rows
