"""A campaign that people judge: it samples all, waits, goes on, and is the same after a kill."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from test_annotation import work
from test_bad_input import cli
from tiny import digests, in_child, tiny_config

from online_dpo import Campaign
from online_dpo.annotation.commands import open_board
from online_dpo.integrity import write_start
from online_dpo.judge_clashes import PEOPLE
from online_dpo.store import RunDir
from online_dpo.tables import read_table


class Run:
    """What `work` needs of a run: its board, made anew each time as every command does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def board(self) -> Any:
        return open_board(self.path)


def redder(task: dict[str, Any], number: int) -> str:
    """Prefers the answer with more of one letter; some ties."""
    a, b = (answer["text"].count("e") for answer in task["answers"])
    return "a" if a > b else "b" if b > a else "tie"


def config(run_dir: Path, **options: Any) -> dict[str, Any]:
    asked = {"annotators": ["ann", "bob"], "per_item": 2, "repeats": 0.0, **options}
    made = tiny_config(run_dir, campaign={"rounds": 1})
    heuristic = made["judge"]
    made["judge"] = {"name": PEOPLE, "options": asked, "comparisons": 2}
    made["evaluation"] = {"judge": heuristic}
    return made


def start(run_dir: Path, made: dict[str, Any]) -> tuple[int, str]:
    from online_dpo.config_file import dump_yaml

    file = run_dir.parent / "people.yaml"
    file.write_text(dump_yaml(made))
    return command(run_dir, "run", str(file))


def command(run_dir: Path, *words: str) -> tuple[int, str]:
    log = run_dir.parent / "log.txt"
    code = in_child(cli, list(words), str(log))
    return code, log.read_text()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished campaign; its rounds waited once."""
    run_dir = tmp_path_factory.mktemp("labelled") / "run"
    code, said = start(run_dir, config(run_dir))
    assert code == 11, said
    assert "Round 1 waits for people: 0 of " in said
    assert f"to go on: online-dpo label {run_dir} --annotator NAME; online-dpo resume" in said
    assert "safe: round 0; of round 1: samples (2 parts)." in said
    # All is sampled before anybody is waited for, and asked at once.
    assert len(RunDir(run_dir).round(1).children("samples")) == 2
    assert len(open_board(run_dir).parts("round-001")) == 2
    assert Campaign(run_dir).state == "waiting"
    code, said = command(run_dir, "status", str(run_dir))
    assert "waits for  people: online-dpo label" in said
    assert "now at     round 1, label (" in said
    work(Run(run_dir), "ann", redder)  # type: ignore[arg-type]
    code, said = command(run_dir, "resume", str(run_dir))
    assert (
        code == 11 and "Left to do: bob " in said and "ann" not in said.split("Left to do")[1][:9]
    )
    work(Run(run_dir), "bob", redder)  # type: ignore[arg-type]
    assert Campaign(run_dir).state == "stopped"
    code, said = command(run_dir, "resume", str(run_dir))
    assert code == 0, said
    return run_dir


def test_the_labels_are_what_people_said(labelled: Path) -> None:
    rows = [
        row
        for name in RunDir(labelled).round(1).children("labels")
        for row in read_table(labelled / "rounds/001" / name / "labels.parquet")
    ]
    texts = {
        row["id"]: row["text"]
        for name in RunDir(labelled).round(1).children("samples")
        for row in read_table(labelled / "rounds/001" / name / "samples.parquet")
    }
    assert len(rows) == 16
    for row in rows:
        first, second = (texts[row[side]].count("e") for side in ("first_id", "second_id"))
        assert row["p"] == (1.0 if first > second else 0.0 if second > first else 0.5)
    code, said = command(labelled, "label", str(labelled))
    assert code == 0 and "Cohen's kappa 1.00" in said
    assert "Every item has its verdicts" in said
    events = [e for e in RunDir(labelled).events() if e.get("event") == "people"]
    assert all(event["observed"] == 1.0 for event in events) and len(events) == 2


def test_labels_do_not_depend_on_when_people_answer(labelled: Path, tmp_path: Path) -> None:
    """The same verdicts in another order, with some waiting between shards: the same bytes."""
    run_dir = tmp_path / "run"
    assert start(run_dir, config(run_dir))[0] == 11
    work(Run(run_dir), "bob", redder)  # type: ignore[arg-type]
    board = open_board(run_dir)
    first = {item.id for item in board.parts("round-001")[0].items}
    with board.open_log("ann") as log:
        for task in [t for t in board.tasks("ann", "round-001") if t.item.id in first]:
            shown = task.item.answers[::-1] if task.swapped else task.item.answers
            choice = redder({"answers": [{"text": answer.text} for answer in shown]}, 0)
            log.give(task, choice, seconds=None, time=0.0, via="import")  # type: ignore[arg-type]
    code, said = command(run_dir, "resume", str(run_dir))
    assert code == 11 and "safe: round 0; of round 1: samples (2 parts), labels (1 part)." in said
    # Somebody falls ill: who labels may change though labels of the round are made.
    changed = "judge.options.annotators=[ann, cy]"
    code, said = command(run_dir, "resume", str(run_dir), "--accept-change", "--set", changed)
    assert code == 11, said
    work(Run(run_dir), "ann", redder)  # type: ignore[arg-type]
    code, said = command(run_dir, "resume", str(run_dir))
    assert code == 0, said
    mine, theirs = digests(run_dir), digests(labelled)
    same = [name for name in theirs if name.startswith("rounds/001") and "labels" in name]
    assert same and all(mine[name] == theirs[name] for name in same)
    assert mine["rounds/001/pairs/pairs.parquet"] == theirs["rounds/001/pairs/pairs.parquet"]


def test_redoing_a_round_asks_people_anew_but_keeps_their_word(
    labelled: Path, tmp_path: Path
) -> None:
    from online_dpo.endings import redo_command

    command_line = redo_command(RunDir(labelled).round(1), "labels")
    assert str(labelled / "annotation/items/round-001") in command_line
    assert "verdicts" not in command_line


def test_a_campaign_that_asks_nobody_says_so(tmp_path: Path) -> None:
    from people_run import make_people_run

    run = make_people_run(tmp_path)
    *lines, _ = (run.path / "campaign.yaml").read_text().splitlines(keepends=True)
    config = "".join(lines).replace("name: human", "name: heuristic")
    write_start(RunDir(run.path), "{}\n", config)
    with contextlib.suppress(SystemExit):
        code, said = command(run.path, "label", str(run.path))
    assert code == 2 and "asks nobody to label: its judge is 'heuristic'" in said
    code, said = command(run.path, "label", str(run.path), "--port", "80")
    assert code == 2 and "name an --annotator" in said
