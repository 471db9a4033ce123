"""Tasks and verdicts as JSONL or CSV, to label with another tool and bring the verdicts back."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from online_dpo.annotation.board import Board, Part
from online_dpo.annotation.log import Given
from online_dpo.annotation.tasks import CHOICES, Choice, Task
from online_dpo.errors import ConfigError
from online_dpo.files import disk_faults, write_atomic
from online_dpo.rows import read_rows

COLUMNS = ("task", "annotator", "round", "prompt", "a", "b", "verdict", "seconds")
"""Of every row. `b` is empty where one answer is shown, `verdict` where there is none yet."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def export_labels(board: Board, out: Path) -> int:
    """Write every task of every annotator, with its verdict; returns how many there are."""
    as_csv = _is_csv(out)
    rows = list(_rows(board))
    text = _csv(rows) if as_csv else "".join(json.dumps(row) + "\n" for row in rows)
    with disk_faults(out):
        write_atomic(out, text)
        out.chmod(0o600)
    return len(rows)


def import_labels(board: Board, path: Path) -> int:
    """Take over the verdicts of a file in which `task` and `verdict` are filled in.

    What stands there already is passed over; returns how many verdicts were new. Raises ConfigError
    naming the first row that cannot be taken over, before anything is.
    """
    tasks = {
        task.id: (task, part)
        for batch in board.batches
        for name in board.names
        for task, part in _with_parts(board, name, batch)
    }
    known = {g.task: g for name in board.names for g in board.given(name)}
    wanted = [
        found
        for line, values in _read(path)
        if (found := _checked(f"{path}:{line}", values, tasks, known, board.options.ask))
    ]
    new = {task.id: (task, choice, seconds) for task, choice, seconds in wanted}
    with contextlib.ExitStack() as logs:
        names = {task.annotator for task, _, _ in new.values()}
        opened = {name: logs.enter_context(board.open_log(name)) for name in sorted(names)}
        now = round(time.time(), 3)
        for task, choice, seconds in new.values():
            opened[task.annotator].give(task, choice, seconds=seconds, time=now, via="import")
    return len(new)


def _rows(board: Board) -> Iterator[dict[str, Any]]:
    for name in board.names:
        given = {g.task: g for g in board.given(name)}
        for batch in board.batches:
            for task in board.all_tasks(name, batch):
                yield _row(task, given.get(task.id))


def _row(task: Task, given: Given | None) -> dict[str, Any]:
    shown = task.item.answers[::-1] if task.swapped else task.item.answers
    messages = task.item.messages
    prompt = "\n\n".join(f"{m.role}: {m.content}" for m in messages)
    return {
        "task": task.id,
        "annotator": task.annotator,
        "round": task.batch,
        "prompt": messages[0].content if len(messages) == 1 else prompt,
        "a": shown[0].text,
        "b": shown[1].text if len(shown) == 2 else None,
        "verdict": given.choice if given else None,
        "seconds": given.seconds if given else None,
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    """Texts that a spreadsheet would take for a formula get an apostrophe in front."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        texts = {k: f"'{v}" for k, v in row.items() if str(v).startswith(_FORMULA)}
        writer.writerow({**row, **texts})
    # What UTF-8 cannot hold (half of a surrogate pair) is escaped; the JSON lines are exact.
    return out.getvalue().encode("utf-8", "backslashreplace").decode()


def _with_parts(board: Board, name: str, batch: str) -> Iterator[tuple[Task, Part | None]]:
    parts = {item.id: part for part in board.parts(batch) for item in part.items}
    for task in board.all_tasks(name, batch):
        yield task, parts.get(task.item.id)


def _read(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not _is_csv(path):
        for row in read_rows(str(path)):
            if row.values is None:
                raise ConfigError(f"{path}:{row.line}: {row.problem}.")
            yield row.line, row.values
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for values in reader:
                yield reader.line_num, values
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV: {error}.") from None


def _checked(
    place: str,
    values: Mapping[str, Any],
    tasks: Mapping[str, tuple[Task, Part | None]],
    known: Mapping[str, Given],
    ask: str,
) -> tuple[Task, Choice, float | None] | None:
    """The verdict of a row; None where there is none, or where it is known already."""
    verdict = str(values.get("verdict") or "").strip().lower()
    if not verdict:
        return None
    choice = next((c for c in CHOICES[ask] if c == verdict), None)
    if choice is None:
        raise ConfigError(f"{place}: verdict {verdict!r} is none of {', '.join(CHOICES[ask])}.")
    task_id = str(values.get("task"))
    if task_id not in tasks:
        raise ConfigError(f"{place}: there is no task {task_id!r} here; export them first.")
    task, part = tasks[task_id]
    before = known.get(task_id)
    if before is not None and before.choice == choice:
        return None
    if before is not None:
        raise ConfigError(
            f"{place}: {task.annotator} has said {before.choice!r} on task {task_id}, not "
            f"{choice!r}; take that back on the page first."
        )
    if part is not None and part.closed:
        raise ConfigError(f"{place}: the labels of task {task_id} are made; nothing changes them.")
    return task, choice, _seconds(place, values.get("seconds"))


def _seconds(place: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return round(float(value), 1)
    except (TypeError, ValueError):
        raise ConfigError(f"{place}: seconds {value!r} is no number.") from None


def _is_csv(path: Path) -> bool:
    if path.suffix not in (".jsonl", ".csv"):
        raise ConfigError(f"{path}: labels are exchanged as .jsonl or .csv.")
    return path.suffix == ".csv"
