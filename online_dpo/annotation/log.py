"""One annotator's verdicts in a file that is only ever appended to, synced line by line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from online_dpo.annotation.tasks import CHOICES, Choice, Purpose, Task
from online_dpo.errors import CorruptError, LockedError
from online_dpo.files import disk_faults, fsync_path

_START = hashlib.sha256().hexdigest()
_KNOWN = {choice for choices in CHOICES.values() for choice in choices}


@dataclass(frozen=True)
class Given:
    """A verdict as it was given. `seq` counts an annotator's lines from 0.

    `value` is the item's (1: its first answer is better, or its only one good), None for skip.
    `seconds` is how long the task was in view, `time` the clock's time; None where unknown.
    """

    seq: int
    task: str
    item: str
    batch: str
    purpose: Purpose
    swapped: bool
    choice: Choice
    value: float | None
    seconds: float | None
    time: float
    via: str


class LabelLog:
    """The one writer of an annotator's file. Raises LockedError where there is another."""

    def __init__(self, path: Path, annotator: str) -> None:
        """Cuts off a last line that a crash has torn. Raises CorruptError for other damage."""
        self._path = path
        new = not path.exists()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with disk_faults(path):
            self._file = os.open(path, flags, 0o600)
        try:
            self._lock(annotator)
            with disk_faults(path):
                if new:
                    fsync_path(path.parent)
                data = path.read_bytes()
                self._size = data.rfind(b"\n") + 1
                if self._size < len(data):
                    os.truncate(self._file, self._size)
                    os.fsync(self._file)
            rows, self._chain = _parse(path, data)
            self._num_rows = len(rows)
            self._standing = {given.seq: given for given in _standing(rows)}
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> LabelLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    @property
    def given(self) -> list[Given]:
        """The verdicts that hold, in the order in which they were given."""
        return list(self._standing.values())

    def give(
        self, task: Task, choice: Choice, *, seconds: float | None, time: float, via: str
    ) -> None:
        """Append a verdict; it is on the disk when this returns. Raises DiskError."""
        given = Given(
            self._num_rows, task.id, task.item.id, task.batch, task.purpose, task.swapped,
            choice, task.value(choice), seconds, time, via,
        )  # fmt: skip
        self._append(asdict(given))
        self._standing[given.seq] = given

    def undo(self, given: Given, *, time: float) -> None:
        """Take a verdict back; the line stays, and another one says so. Raises DiskError."""
        self._append({"seq": self._num_rows, "undo": given.seq, "time": time})
        del self._standing[given.seq]

    def _append(self, row: dict[str, Any]) -> None:
        chain = _link(self._chain, row)
        line = json.dumps({**row, "chain": chain}).encode() + b"\n"
        with disk_faults(self._path):
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(28, os.strerror(28), str(self._path))
                os.fsync(self._file)
            except OSError:
                os.truncate(self._file, self._size)
                raise
        self._size += len(line)
        self._num_rows += 1
        self._chain = chain

    def _lock(self, annotator: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{annotator} is labelling already: another `online-dpo label` holds {self._path}."
            ) from None


def read_log(path: Path) -> list[Given]:
    """The verdicts that hold in a file that another process may be writing; no file is none."""
    if not path.is_file():
        return []
    rows, _ = _parse(path, path.read_bytes())
    return _standing(rows)


def _parse(path: Path, data: bytes) -> tuple[list[dict[str, Any]], str]:
    """The rows of all whole lines, and the hash over them. Raises CorruptError."""
    rows: list[dict[str, Any]] = []
    chain = _START
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            stated = row.pop("chain")
        except (ValueError, KeyError, AttributeError):
            row, stated = {}, None
        chain = _link(chain, row)
        if stated != chain or not _is_sound(row, rows):
            raise CorruptError(
                f"{path}, line {number}, is not what was written: restore the file from a copy."
            )
        rows.append(row)
    return rows, chain


def _is_sound(row: dict[str, Any], before: list[dict[str, Any]]) -> bool:
    if row["seq"] != len(before):
        return False
    if "undo" in row:
        return row["undo"] in range(len(before))
    return row.get("choice") in _KNOWN


def _standing(rows: list[dict[str, Any]]) -> list[Given]:
    undone = {row["undo"] for row in rows if "undo" in row}
    return [Given(**row) for row in rows if "undo" not in row and row["seq"] not in undone]


def _link(chain: str, row: dict[str, Any]) -> str:
    return hashlib.sha256((chain + json.dumps(row, sort_keys=True)).encode()).hexdigest()
