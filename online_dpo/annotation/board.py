"""The folder of a run where a campaign posts what people are to label, and their logs lie.

annotation/
  items/round-001/part-00000.jsonl    what labelling asked; part-00000.closed: labels are made
  gold.jsonl                          items whose verdict is known
  verdicts/ann.jsonl                  one file for each annotator
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from online_dpo.annotation.items import Item, from_row, to_row
from online_dpo.annotation.log import Given, LabelLog, read_log
from online_dpo.annotation.options import PeopleOptions
from online_dpo.annotation.tasks import Task, assigned, make_task, tasks_of
from online_dpo.errors import CorruptError
from online_dpo.files import PARTIAL, disk_faults, fsync_path

FOLDER = "annotation"


@dataclass(frozen=True)
class Part:
    """Items that were asked together. Closed: their labels are made, and nothing changes them."""

    name: str
    items: tuple[Item, ...]
    closed: bool


class Board:
    """What people are asked in a run, and have answered. Only the campaign posts and closes."""

    def __init__(self, run: Path, options: PeopleOptions, *, seed: int) -> None:
        self.path = run / FOLDER
        self.options = options
        self.seed = seed
        self._read: dict[Path, tuple[Item, ...]] = {}
        self._drawn: tuple[object, list[Task]] = (None, [])

    @property
    def batches(self) -> list[str]:
        """The rounds in which something was asked, in order: "round-001", ..."""
        folder = self.path / "items"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(names, key=lambda name: (len(name), name))

    def parts(self, batch: str) -> list[Part]:
        """What was asked in a batch. Raises CorruptError where a file is not as it was posted."""
        folder = self.path / "items" / batch
        paths = sorted(folder.glob("part-*.jsonl")) if folder.is_dir() else []
        return [Part(p.stem, self._items(p), p.with_suffix(".closed").exists()) for p in paths]

    def post(self, batch: str, items: Sequence[Item]) -> Part:
        """Ask people for these items, which stand in the batch once however often it is asked."""
        wanted = tuple({item.id: item for item in items}.values())
        parts = self.parts(batch)
        ids = [item.id for item in wanted]
        for part in parts:
            if [item.id for item in part.items] == ids:
                return part
        name = f"part-{len(parts):05d}"
        _write_items(self.path / "items" / batch / f"{name}.jsonl", wanted)
        return Part(name, wanted, False)

    def post_gold(self, items: Sequence[Item]) -> None:
        """Keep the known items beside the others: the page needs no file from elsewhere."""
        if list(items) != self.gold():
            _write_items(self.path / "gold.jsonl", items)

    def gold(self) -> list[Item]:
        """The items with a known verdict."""
        path = self.path / "gold.jsonl"
        self._read.pop(path, None)
        return list(self._items(path)) if path.is_file() else []

    def close(self, batch: str, part: Part) -> None:
        """From here on the verdicts on a part are what its labels are made of."""
        _write_private(self.path / "items" / batch / f"{part.name}.closed", "")

    def tasks(self, annotator: str, batch: str) -> list[Task]:
        """An annotator's tasks in a batch, in order."""
        parts, gold = [part.items for part in self.parts(batch)], self.gold()
        key = (annotator, batch, len(parts), tuple(item.id for item in gold))
        if self._drawn[0] != key:
            drawn = tasks_of(annotator, parts, gold, self.options, batch=batch, seed=self.seed)
            self._drawn = (key, drawn)
        return list(self._drawn[1])

    def all_tasks(self, annotator: str, batch: str) -> list[Task]:
        """The annotator's tasks, and after them what they have answered in another's place."""
        tasks = self.tasks(annotator, batch)
        drawn = {task.item.id for task in tasks if task.purpose == "item"}
        done = {given.item for given in self.given(annotator) if given.purpose == "item"} - drawn
        return tasks + [
            make_task(annotator, item, "item", batch=batch, seed=self.seed)
            for part in self.parts(batch)
            for item in part.items
            if item.id in done
        ]

    @property
    def names(self) -> list[str]:
        """The annotators of the config, and those of before whose verdicts still count."""
        folder = self.path / "verdicts"
        logs = {p.stem for p in folder.glob("*.jsonl")} if folder.is_dir() else set()
        return [*self.options.annotators, *sorted(logs - set(self.options.annotators))]

    def open_log(self, annotator: str) -> LabelLog:
        """The annotator's file, to write. Raises LockedError where somebody else writes it."""
        path = self._log(annotator)
        with disk_faults(path):
            _make_folder(path.parent)
        return LabelLog(path, annotator)

    def given(self, annotator: str) -> list[Given]:
        """An annotator's verdicts so far."""
        return read_log(self._log(annotator))

    def votes(self) -> dict[str, dict[str, float | None]]:
        """Item id to annotator to value, of everything that counts towards labels."""
        votes: dict[str, dict[str, float | None]] = {}
        for annotator in self.names:
            for given in self.given(annotator):
                if given.purpose == "item":
                    votes.setdefault(given.item, {})[annotator] = given.value
        return votes

    def lacking(
        self, items: Iterable[Item], votes: dict[str, dict[str, float | None]]
    ) -> list[Item]:
        """The items that fewer annotators have answered than the config asks for."""
        return [i for i in items if len(votes.get(i.id, {})) < self.options.per_item]

    def open_items(self) -> list[Item]:
        """What still lacks verdicts in the newest batch, whose labels are not made."""
        if not self.batches:
            return []
        items = [i for p in self.parts(self.batches[-1]) if not p.closed for i in p.items]
        return self.lacking(items, self.votes())

    def still_to_do(self) -> dict[str, int]:
        """How many of the open items wait for each annotator that they were drawn for."""
        votes = self.votes()
        waiting = dict.fromkeys(self.options.annotators, 0)
        for item in self.open_items():
            for name in assigned(item, self.options, self.seed):
                waiting[name] += name not in votes.get(item.id, {})
        return waiting

    def _log(self, annotator: str) -> Path:
        return self.path / "verdicts" / f"{annotator}.jsonl"

    def _items(self, path: Path) -> tuple[Item, ...]:
        if path not in self._read:
            try:
                rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
                self._read[path] = tuple(from_row(row) for row in rows)
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptError(f"{path} is not as it was posted: {error}") from None
        return self._read[path]


def batch_title(batch: str) -> str:
    """A batch as people read it: "round 1" for "round-001"."""
    name, _, number = batch.rpartition("-")
    return f"{name} {int(number)}" if name and number.isdecimal() else batch


def _write_items(path: Path, items: Sequence[Item]) -> None:
    _write_private(path, "".join(json.dumps(to_row(item)) + "\n" for item in items))


def _write_private(path: Path, text: str) -> None:
    """Make `path` hold `text`, wholly or not at all, for this user's eyes."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_faults(path):
        _make_folder(path.parent)
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        fsync_path(path.parent)


def _make_folder(path: Path) -> None:
    """A folder that only this user may enter, and those above it that are missing."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(mode=0o700)
        fsync_path(path.parent)
