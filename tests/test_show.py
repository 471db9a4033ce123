"""`online-dpo show`: a row that was trained on, and what each of several judges or people said."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from people_run import PeopleRun, make_people_run, pairs
from test_annotation import work

from online_dpo.config import JudgeConfig
from online_dpo.display.terminal import print_row
from online_dpo.integrity import write_start
from online_dpo.judging import Labeller, Labels
from online_dpo.pairing import Judged, best_worst, make_pairs
from online_dpo.records import Prompt, Response, to_dict
from online_dpo.stages.label import _rows as label_rows
from online_dpo.store import RunDir
from online_dpo.tables import prompt_row, read_table, write_table
from online_dpo.unpaired import make_unpaired
from online_dpo.views import Campaign

Items = Sequence[tuple[Prompt, Sequence[Response]]]


def write_rounds(path: Path, judge: str, items: Items, labels: Sequence[Labels]) -> None:
    """Rounds 0 and 1 of a run, as far as they hold what `show` reads."""
    run = RunDir(path)
    run.round(0).write_plan({"round": 0, "seed": 0})
    run.round(1).write_plan({"round": 1, "seed": 0})
    with run.round(0).commit("prompts", inputs={}) as draft:
        rows = [prompt_row(prompt, role="train", weight=1.0) for prompt, _ in items]
        write_table(draft.path / "prompts.parquet", "prompts", rows)
    with run.round(1).commit("labels/part-00000", inputs={}) as draft:
        table = [
            r for (p, rs), la in zip(items, labels, strict=True) for r in label_rows((p, [*rs]), la)
        ]
        write_table(draft.path / "labels.parquet", "labels", table)
        draft.facts = {"judge": {"name": judge, "version": "1"}}
    judged = [
        Judged(p, rs, scores=la.scores, comparisons=la.comparisons)
        for (p, rs), la in zip(items, labels, strict=True)
    ]
    kind = "pairs" if labels[0].scores is None else "unpaired"
    with run.round(1).commit(kind, inputs={}) as draft:
        made: Sequence[Any]
        if kind == "pairs":
            made = make_pairs(
                judged, best_worst, round_number=1, seed=0, scale=1.0, min_margin=0.0,
                max_per_prompt=None,
            ).preferences  # fmt: skip
        else:
            made = make_unpaired(judged, threshold=0.5, min_margin=0.0, round_number=1).rows
        rows = [{**to_dict(row)} for row in made]
        write_table(draft.path / f"{kind}.parquet", kind, rows)


def shown(
    path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], str]:
    """A row of round 1, and what is shown of it."""
    kind, column = ("pairs", "pair_id")
    if RunDir(path).round(1).has("unpaired"):
        kind, column = ("unpaired", "row_id")
    row = read_table(path / f"rounds/001/{kind}/{kind}.parquet")[number]
    print_row(Campaign(path), row[column])
    return row, capsys.readouterr().out


def people(folder: Path, items: Items, verdicts: dict[str, Any], **options: Any) -> PeopleRun:
    run = make_people_run(folder, annotators=[*verdicts], per_item=len(verdicts), **options)
    run.post(items)
    for name, choose in verdicts.items():
        work(run, name, choose)
    write_rounds(run.path, "human", items, run.ask(items))
    return run


def test_who_said_what_of_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def better(task: dict[str, Any], number: int) -> str:
        return "ab"["better" in task["answers"][1]["text"]]

    def worse(task: dict[str, Any], number: int) -> str:
        return "ba"["better" in task["answers"][1]["text"]]

    verdicts = {"ann": better, "bob": worse, "cy": better, "dee": lambda task, number: "skip"}
    run = people(tmp_path, pairs(1), verdicts)
    row, said = shown(run.path, 0, capsys)
    assert row["chosen_text"] == "The better answer to 0."
    assert "judge: p 1.000 that the chosen one is better" in said
    assert "  ann  chosen\n  bob  rejected\n  cy   chosen\n  dee  skipped\n  2 of 3 agree\n" in said


def test_who_said_what_of_a_good_response(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def honest(task: dict[str, Any], number: int) -> str:
        return "good" if "better" in task["answers"][0]["text"] else "bad"

    verdicts = {"ann": honest, "bob": honest, "cy": lambda task, number: "skip"}
    run = people(tmp_path, pairs(1), verdicts, ask="rate")
    bad, said = shown(run.path, 0, capsys)
    assert said.startswith(
        f"bad response {bad['row_id']}: trained on in round 1, from the samples of round 1\n"
        "source test, 0.500 from the threshold\n\nprompt\n  Question 0?\n\n"
        "bad: 2 tokens, score 0.000\n  A poor answer to 0.\n"
    )
    assert "  ann  bad\n  bob  bad\n  cy   skipped\n  all 2 agree\n" in said
    good, said = shown(run.path, 1, capsys)
    assert f"good response {good['row_id']}" in said and "  ann  good\n" in said


@pytest.mark.parametrize("orders", ["both", "one"])
def test_what_each_member_of_a_panel_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], orders: Any
) -> None:
    """Several pairs, so that a single order is drawn both ways; one member always takes the first
    that it is shown, one takes the better answer, one knows of nothing."""
    run, items = make_people_run(tmp_path), pairs(6)
    length = Path(__file__).parent / "judge_cases.py"
    known = [
        {"first": r[1].text, "second": r[0].text, "p": 1.0} for _, r in items
    ]  # the better one, in whichever order
    members = [
        {"name": "scripted", "label": "script", "options": {"verdicts": known}},
        {"name": f"{length}:AsyncFirst", "label": "first"},
        {"name": "scripted", "label": "silent", "options": {"verdicts": []}},
    ]
    config = JudgeConfig(
        name="panel", options={"members": members, "quorum": 2, "vote": "mean"}, orders=orders
    )
    labeller = Labeller(
        config,
        base=None,
        ledger_path=run.path / "judgments.sqlite",
        seed=5,
        round=1,
        on_event=run.events.append,
    )
    with contextlib.closing(labeller):
        labels = labeller.label(items, purpose="round-001")
    *lines, _ = (run.path / "campaign.yaml").read_text().splitlines(keepends=True)
    asked = "".join(lines).replace("orders: both", f"orders: {orders}")
    write_start(RunDir(run.path), "{}\n", asked)
    write_rounds(run.path, "panel", items, labels)
    made = read_table(run.path / "rounds/001/pairs/pairs.parquet")
    assert made
    for number in range(len(made)):
        _, said = shown(run.path, number, capsys)
        if orders == "both":
            assert "  first   p 0.000, p 1.000\n  script  p 1.000, p 1.000\n" in said
            assert "  silent  no verdict, no verdict (not in the script)\n  1 of 2 agree" in said
        else:
            # The first one shown won only where it is the better one: all others were ties.
            assert "  first   p 1.000\n  script  p 1.000\n" in said and "  all 2 agree\n" in said
