"""One annotator at work: the next task, a verdict, an undo; what the page shows of each."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from online_dpo.annotation.board import Board, batch_title
from online_dpo.annotation.log import Given, LabelLog
from online_dpo.annotation.tasks import CHOICES, Task, assigned, make_task
from online_dpo.display.visible import visible

MAX_SECONDS = 86_400.0
"""The longest time for one task that is believed."""


class Refused(Exception):
    """What the page asked for cannot be done; the text says why."""


@dataclass(frozen=True)
class _Queue:
    """An annotator's tasks of a batch: all that count, and of these the open ones, in order."""

    tasks: list[Task]
    open: list[Task]


class Desk:
    """Works on one annotator's log. `stand_in` adds what others have left open."""

    def __init__(
        self, board: Board, log: LabelLog, annotator: str, *, stand_in: bool = False
    ) -> None:
        self._board = board
        self._log = log
        self._annotator = annotator
        self._stand_in = stand_in
        self.num_saved = 0
        """Verdicts given here, less those taken back."""

    def state(self) -> dict[str, Any]:
        """Everything that the page shows, as plain JSON types."""
        queue = self._queue()
        task = queue.open[0] if queue.open else None
        return {
            "annotator": self._annotator,
            "batch": batch_title(self._batch()),
            "ask": self._board.options.ask,
            "rubric": visible(self._board.options.rubric),
            "done": len(queue.tasks) - len(queue.open),
            "total": len(queue.tasks),
            "others": 0 if queue.open else sum(self._board.still_to_do().values()),
            "can_undo": self._last() is not None,
            "task": None if task is None else _shown(task),
        }

    def give(self, task_id: str, choice: Any, seconds: Any = None) -> None:
        """Save a verdict on an open task. Raises Refused, and DiskError where it is not saved."""
        allowed = CHOICES[self._board.options.ask]
        if choice not in allowed:
            raise Refused(f"A verdict is one of {', '.join(allowed)}.")
        task = next((t for t in self._queue().open if t.id == task_id), None)
        if task is None:
            raise Refused("This one has a verdict already, or is not asked any more.")
        self._log.give(
            task, choice, seconds=_believed(seconds), time=round(time.time(), 3), via="page"
        )
        self.num_saved += 1

    def undo(self) -> None:
        """Take back the last verdict. Raises Refused where there is none, and DiskError."""
        last = self._last()
        if last is None:
            raise Refused("There is no verdict to take back: labels are made of the earlier ones.")
        self._log.undo(last, time=round(time.time(), 3))
        self.num_saved -= 1

    def _batch(self) -> str:
        batches = self._board.batches
        return batches[-1] if batches else ""

    def _queue(self) -> _Queue:
        """The tasks of the newest batch, less those that can be answered no more."""
        batch = self._batch()
        if not batch:
            return _Queue([], [])
        open_ids = self._open_ids(batch)
        answered = {given.task for given in self._log.given}
        tasks = self._board.all_tasks(self._annotator, batch)
        if self._stand_in:
            known = {task.id for task in tasks}
            tasks += [task for task in self._left_open(batch) if task.id not in known]
        counted = [
            task
            for task in tasks
            if task.id in answered
            or task.item.id in open_ids
            or (task.purpose == "gold" and open_ids)
        ]
        return _Queue(counted, [task for task in counted if task.id not in answered])

    def _left_open(self, batch: str) -> list[Task]:
        """Items that still lack verdicts, drawn for others."""
        options, seed = self._board.options, self._board.seed
        return [
            make_task(self._annotator, item, "item", batch=batch, seed=seed)
            for item in self._board.open_items()
            if self._annotator not in assigned(item, options, seed)
        ]

    def _open_ids(self, batch: str) -> set[str]:
        parts = self._board.parts(batch)
        closed = {item.id for part in parts if part.closed for item in part.items}
        return {item.id for part in parts if not part.closed for item in part.items} - closed

    def _last(self) -> Given | None:
        """The last verdict, where no label is made of it yet."""
        given = self._log.given
        batch = self._batch()
        if not given or given[-1].batch != batch:
            return None
        last, open_ids = given[-1], self._open_ids(batch)
        may = bool(open_ids) if last.purpose == "gold" else last.item in open_ids
        return last if may else None


def _shown(task: Task) -> dict[str, Any]:
    """A task as the page gets it: neither its purpose nor where an answer comes from."""
    answers = task.item.answers[::-1] if task.swapped else task.item.answers
    return {
        "id": task.id,
        "messages": [
            {"role": visible(message.role), "text": visible(message.content)}
            for message in task.item.messages
        ],
        "answers": [
            {"text": visible(answer.text), "cut_off": answer.cut_off} for answer in answers
        ],
        "rubric": visible(task.item.rubric),
    }


def _believed(seconds: Any) -> float | None:
    """How long a task was in view, as far as the page can be believed."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return None
    if not math.isfinite(seconds) or not 0 <= seconds <= MAX_SECONDS:
        return None
    return round(float(seconds), 1)
