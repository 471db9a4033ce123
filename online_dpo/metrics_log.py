"""metrics.jsonl: the committed metrics of all stages as one rebuildable stream."""

from __future__ import annotations

import json
from typing import Any

from online_dpo.files import read_json
from online_dpo.store import RoundDir, RunDir, read_lines


def metric_rows(round_dir: RoundDir) -> list[dict[str, Any]]:
    """A round's metrics as its stages committed them: a row a stage, and one an optimizer step."""
    rows: list[dict[str, Any]] = []
    shards = [*round_dir.children("samples"), *round_dir.children("labels")]
    for name in [*shards, "judge_check", "pairs", "unpaired", "training", "evaluation"]:
        if round_dir.has(name):
            metrics = read_json(round_dir.path / name / "metrics.json")
            rows.append({"round": round_dir.number, "stage": name, **metrics})
    for step in read_lines(round_dir.path / "training" / "steps.jsonl"):
        rows.append({"round": round_dir.number, "stage": "step", **step})
    return rows


def append_metrics(folder: RunDir, round_dir: RoundDir) -> None:
    """Add a finished round's rows."""
    with (folder.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(_lines(metric_rows(round_dir)))


def rebuild_metrics(folder: RunDir) -> None:
    """Write the file anew from the finished rounds."""
    folder.write_text("metrics.jsonl", _of_finished(folder))


def is_current(folder: RunDir) -> bool:
    """Whether the file holds what the finished rounds committed, no less and no more."""
    file = folder.path / "metrics.jsonl"
    return file.is_file() and file.read_bytes() == _of_finished(folder).encode()


def _of_finished(folder: RunDir) -> str:
    return _lines([row for r in folder.rounds() if r.finished for row in metric_rows(r)])


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
