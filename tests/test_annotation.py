"""People as judges: who is shown what, verdicts that last, how they combine and agree."""

from __future__ import annotations

import csv
import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from people_run import SEED, PeopleRun, make_people_run, pairs, write_jsonl

from online_dpo.annotation.agreement import (
    agreement,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
)
from online_dpo.annotation.desk import Desk, Refused
from online_dpo.annotation.exchange import export_labels, import_labels
from online_dpo.annotation.figures import figures
from online_dpo.annotation.items import Item, ShownAnswer, item_of
from online_dpo.annotation.log import LabelLog, read_log
from online_dpo.annotation.options import people_options
from online_dpo.annotation.tasks import assigned, make_task, tasks_of
from online_dpo.config_file import config_from_dict
from online_dpo.errors import ConfigError, CorruptError, DiskError, LockedError
from online_dpo.records import Message, Prompt, Response
from online_dpo.voting import combine_votes

OPTIONS: dict[str, Any] = {"annotators": ["ann", "bob", "cy"], "per_item": 2, "repeats": 0.2}


def items(count: int, first: int = 0) -> list[Item]:
    return [item_of(prompt, responses)[0] for prompt, responses in pairs(count, first=first)]


def work(run: PeopleRun, annotator: str, choose: Any, *, stand_in: bool = False) -> int:
    """Give verdicts until there is no task left; `choose` gets the shown task and its number."""
    with run.board.open_log(annotator) as log:
        desk = Desk(run.board, log, annotator, stand_in=stand_in)
        while (task := desk.state()["task"]) is not None:
            desk.give(task["id"], choose(task, desk.num_saved), 1.5)
        return desk.num_saved


def better(task: dict[str, Any], number: int = 0) -> str:
    """Chooses the answer that says of itself that it is better."""
    return "ab"["better" in task["answers"][1]["text"]]


def worse(task: dict[str, Any], number: int = 0) -> str:
    return "ba"["better" in task["answers"][1]["text"]]


# --- combining votes


def test_votes_combine_by_hand() -> None:
    assert combine_votes([1.0, 1.0, 0.0], "majority") == 1.0
    assert combine_votes([1.0, 0.5, 0.5], "majority") == 0.5
    assert combine_votes([1.0, 0.0], "majority") == 0.5
    assert combine_votes([0.9, 0.6, 0.1], "majority") == 1.0
    assert combine_votes([1.0, 0.0, 0.5], "mean") == 0.5
    assert combine_votes([1.0, 0.5], "mean") == 0.75
    assert combine_votes([0.0, 0.0], "unanimous") == 0.0
    assert combine_votes([0.0, 0.5], "unanimous") == 0.5
    assert combine_votes([1.0, 0.0], "majority", weights=[2.0, 1.0]) == 1.0
    assert combine_votes([1.0, 0.0], "mean", weights=[3.0, 1.0]) == 0.75


RULES = st.sampled_from(["majority", "mean", "unanimous"])


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=7), RULES)
def test_swapping_turns_p_round_and_the_order_does_not_count(votes: list[float], rule: Any) -> None:
    p = combine_votes(votes, rule)
    assert combine_votes([1.0 - vote for vote in votes], rule) == pytest.approx(1.0 - p)
    assert combine_votes(votes[::-1], rule) == p


# --- agreement


def test_cohens_kappa_is_his() -> None:
    """The example of grant proposals: 20 and 15 agreed, 5 and 10 not; kappa is 0.4."""
    table = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15
    assert cohen_kappa(table) == pytest.approx(0.4)
    assert cohen_kappa([(1.0, 1.0)] * 3) is None


def test_fleiss_kappa_is_his() -> None:
    """The table of Fleiss' paper as Wikipedia has it: 10 subjects, 14 raters, kappa 0.210."""
    rows = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    units = [[float(k) for k, n in enumerate(row) for _ in range(n)] for row in rows]
    assert fleiss_kappa(units) == pytest.approx(0.210, abs=5e-4)


def test_krippendorffs_alpha_is_his() -> None:
    """Three coders, fifteen units, missing values; alpha for nominal data is 0.691."""
    coders = (
        "*****34121133*3", "1*213343*******", "**21344*21133*4",
    )  # fmt: skip
    columns = zip(*coders, strict=True)
    units = [[float(v) for v in column if v != "*"] for column in columns]
    assert krippendorff_alpha([u for u in units if len(u) > 1]) == pytest.approx(0.691, abs=5e-4)


def test_agreement_names_what_fits_the_number_of_annotators() -> None:
    two = agreement([{"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 1.0}, {"a": 1.0}, {"a": None, "b": 0.0}])
    assert (two["items"], two["items_shared"], two["observed"]) == (4, 2, 0.5)
    assert "cohen_kappa" in two and "fleiss_kappa" not in two
    three = agreement([{"a": 1.0, "b": 1.0}, {"b": 0.0, "c": 0.0}, {"a": 1.0, "c": 0.0}])
    assert "fleiss_kappa" in three and "cohen_kappa" not in three
    assert agreement([{"a": 1.0}]) == {"items": 1, "items_shared": 0}


# --- who is shown what


def test_every_item_goes_to_k_annotators_and_evenly() -> None:
    options, all_items = people_options(OPTIONS), items(300)
    drawn = [assigned(item, options, SEED) for item in all_items]
    assert all(len(set(names)) == 2 for names in drawn)
    counts = Counter(name for names in drawn for name in names)
    assert all(170 < count < 230 for count in counts.values())
    shown = {
        name: {t.item.id for t in draw(name, [all_items]) if t.purpose == "item"}
        for name in options.annotators
    }
    assert all(
        {name for name in shown if item.id in shown[name]} == set(names)
        for item, names in zip(all_items, drawn, strict=True)
    )


def test_who_joins_changes_nothing_among_the_others() -> None:
    fewer = people_options({"annotators": ["ann", "bob"]})
    more = people_options({"annotators": ["ann", "bob", "cy"]})
    for item in items(60):
        (now,) = assigned(item, more, SEED)
        assert now == "cy" or (now,) == assigned(item, fewer, SEED)


def draw(annotator: str, parts: list[list[Item]], gold: Any = (), **changes: Any) -> Any:
    options = people_options(OPTIONS | changes)
    return tasks_of(annotator, parts, gold, options, batch="round-001", seed=SEED)


def test_the_order_shown_is_drawn_and_a_repeat_is_the_other_way_round() -> None:
    tasks = draw("ann", [items(400)])
    own = {task.item.id: task for task in tasks if task.purpose == "item"}
    assert 0.4 < sum(task.swapped for task in own.values()) / len(own) < 0.6
    others = {task.item.id: task for task in draw("bob", [items(400)]) if task.purpose == "item"}
    assert {own[i].swapped == others[i].swapped for i in own.keys() & others} == {True, False}
    repeats = [task for task in tasks if task.purpose == "repeat"]
    assert 0.1 < len(repeats) / len(own) < 0.3
    for task in repeats:
        first = own[task.item.id]
        assert task.swapped != first.swapped and task.id != first.id
        assert tasks.index(task) >= tasks.index(first) + 10 or task in tasks[-10:]


def test_a_later_part_changes_nothing_before_it() -> None:
    first, later = items(60), items(30, first=60)
    before = [t for t in draw("ann", [first]) if t.purpose == "item"]
    after = [t for t in draw("ann", [first, later]) if t.purpose == "item"]
    assert after[: len(before)] == before and len(after) > len(before)


def test_gold_is_spread_among_the_items_and_hidden() -> None:
    gold = [
        Item((Message("user", f"Known {i}?"),), (ShownAnswer("x"), ShownAnswer("y")), gold=1.0)
        for i in range(30)
    ]
    tasks = draw("ann", [items(150)], gold, gold_share=0.1)
    places = [place for place, task in enumerate(tasks) if task.purpose == "gold"]
    own = sum(task.purpose == "item" for task in tasks)
    assert len(places) == pytest.approx(own * 0.1, abs=1)
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) < 20
    assert len({len(task.id) for task in tasks}) == 1
    assert len({task.id for task in tasks}) == len(tasks)
    assert not [t for t in draw("ann", [items(50)], gold, gold_share=0.0) if t.purpose == "gold"]


def test_a_choice_becomes_the_items_value() -> None:
    (item,) = items(1)
    for swapped, values in ((False, (1.0, 0.0)), (True, (0.0, 1.0))):
        task = next(
            t for n in range(20)
            if (t := make_task("ann", item, "item", batch="b", seed=n)).swapped == swapped
        )  # fmt: skip
        assert (task.value("a"), task.value("b")) == values
        assert (task.value("tie"), task.value("skip")) == (0.5, None)


# --- the log


@pytest.fixture
def task() -> Any:
    return make_task("ann", items(1)[0], "item", batch="round-001", seed=SEED)


def give(log: LabelLog, task: Any, choice: Any = "a") -> None:
    log.give(task, choice, seconds=1.0, time=2.0, via="page")


def test_a_log_keeps_verdicts_and_undos(tmp_path: Path, task: Any) -> None:
    path = tmp_path / "ann.jsonl"
    with LabelLog(path, "ann") as log:
        give(log, task)
        log.undo(log.given[-1], time=3.0)
        assert log.given == []
        give(log, task, "tie")
    assert [(g.choice, g.value) for g in read_log(path)] == [("tie", 0.5)]
    assert len(path.read_text().splitlines()) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_torn_last_line_is_repaired(tmp_path: Path, task: Any) -> None:
    path = tmp_path / "ann.jsonl"
    with LabelLog(path, "ann") as log:
        give(log, task)
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert len(read_log(path)) == 1  # somebody may be writing just now
        with LabelLog(path, "ann") as log:
            assert path.read_bytes() == whole
            give(log, task, "b")
        assert [g.choice for g in read_log(path)] == ["a", "b"]
        path.write_bytes(whole)


def test_damage_in_the_middle_is_refused(tmp_path: Path, task: Any) -> None:
    path = tmp_path / "ann.jsonl"
    with LabelLog(path, "ann") as log:
        for choice in ("a", "b", "a"):
            give(log, task, choice)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    flipped = bytearray(whole)
    flipped[whole.index(b'"choice": "b"') + 12] ^= 1
    for damaged in (bytes(flipped), b"".join(lines[::2]), b"".join(lines[1:]), b"\0" * 9 + whole):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"ann\.jsonl, line"):
            read_log(path)
        with pytest.raises(CorruptError):
            LabelLog(path, "ann")
        assert path.read_bytes() == damaged


def test_one_page_an_annotator(tmp_path: Path) -> None:
    with (
        LabelLog(tmp_path / "ann.jsonl", "ann"),
        pytest.raises(LockedError, match="ann is labelling already"),
    ):
        LabelLog(tmp_path / "ann.jsonl", "ann")


def test_a_verdict_is_synced_before_it_counts(
    tmp_path: Path, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd))[1])
    with LabelLog(tmp_path / "ann.jsonl", "ann") as log:
        give(log, task)
        assert synced[-1] == (tmp_path / "ann.jsonl").stat().st_size > 0

        def fails(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(DiskError):
            give(log, task, "b")
        assert len(log.given) == 1
        monkeypatch.setattr(os, "fsync", fsync)
        give(log, task, "tie")
    assert [g.choice for g in read_log(tmp_path / "ann.jsonl")] == ["a", "tie"]


# --- the judge


def test_labels_wait_until_there_are_enough(tmp_path: Path) -> None:
    run = make_people_run(tmp_path, per_item=2, combine="mean")
    asked = pairs(4)
    words = run.post(asked)
    assert words == (
        "Round 1 waits for people: 0 of 4 pairs have their 2 verdicts. Left to do: ann 4, bob 4."
    )
    assert work(run, "ann", better) == 4
    assert "Left to do: bob 4." in run.post(asked)
    work(run, "bob", lambda task, n: worse(task) if n == 0 else better(task))
    labels = run.ask(asked)
    found = [comparison for label in labels for comparison in label.comparisons or ()]
    assert sorted(c.p or 0.0 for c in found) == [0.0, 0.0, 0.0, 0.5]
    words_of = json.loads(found[0].raws[0])
    assert set(words_of) == {"ann", "bob"}
    assert words_of["ann"] == found[0].second_id
    assert run.ask(asked) == labels
    (event,) = [e for e in run.events if e["event"] == "people"][:1]
    assert (event["items_shared"], event["observed"]) == (4, 0.75)


@pytest.mark.parametrize(
    ("combine", "p"), [("majority", 1.0), ("mean", pytest.approx(2 / 3)), ("unanimous", 0.5)]
)
def test_verdicts_combine_by_the_rule(tmp_path: Path, combine: str, p: Any) -> None:
    run = make_people_run(tmp_path, annotators=["ann", "bob", "cy"], per_item=3, combine=combine)
    ((prompt, responses),) = pairs(1)
    asked = [(prompt, responses[::-1])]
    run.post(asked)
    for name, choose in (("ann", better), ("bob", better), ("cy", worse)):
        work(run, name, choose)
    (label,) = run.ask(asked)
    assert [c.p for c in label.comparisons or ()] == [p]


def test_nobodys_word_is_no_verdict(tmp_path: Path) -> None:
    run = make_people_run(tmp_path, per_item=2)
    run.post(pairs(1))
    work(run, "ann", lambda task, n: "skip")
    work(run, "bob", lambda task, n: "skip")
    (comparison,) = run.ask(pairs(1))[0].comparisons or ()
    assert (comparison.p, comparison.reason) == (None, "every annotator skipped it")


def test_good_and_bad_become_scores(tmp_path: Path) -> None:
    run = make_people_run(tmp_path, ask="rate")
    assert "of 4 answers have their verdict" in run.post(pairs(2))
    for name in ("ann", "bob"):
        work(run, name, lambda t, n: "good" if "better" in t["answers"][0]["text"] else "bad")
    scores = [[score.value for score in label.scores or ()] for label in run.ask(pairs(2))]
    assert scores == [[0.0, 1.0], [0.0, 1.0]]


def test_once_labels_are_made_nothing_changes_them(tmp_path: Path) -> None:
    run = make_people_run(tmp_path, annotators=["ann"])
    run.post(pairs(3))
    work(run, "ann", better)
    labels = run.ask(pairs(3))
    assert "0 of 2 pairs" in run.post(pairs(2, first=3)).replace("3 of 5", "0 of 2")
    with run.board.open_log("ann") as log:
        desk = Desk(run.board, log, "ann")
        assert desk.state()["can_undo"] is False
        with pytest.raises(Refused, match="labels are made"):
            desk.undo()
        desk.give(desk.state()["task"]["id"], "tie")
        assert desk.state()["can_undo"] is True
        desk.undo()
    assert run.ask(pairs(3)) == labels


def test_an_undone_verdict_comes_again_and_stale_ones_are_refused(tmp_path: Path) -> None:
    run = make_people_run(tmp_path, annotators=["ann"])
    run.post(pairs(3))
    with run.board.open_log("ann") as log:
        desk = Desk(run.board, log, "ann")
        first = desk.state()["task"]
        desk.give(first["id"], "a", math.nan)
        with pytest.raises(Refused, match="has a verdict already"):
            desk.give(first["id"], "b")
        with pytest.raises(Refused, match="one of a, b, tie, skip"):
            desk.give(desk.state()["task"]["id"], "good")
        assert desk.state()["done"] == 1
        desk.undo()
        assert desk.state()["task"] == first and desk.state()["done"] == 0
    assert run.board.given("ann") == []


def test_somebody_stands_in(tmp_path: Path) -> None:
    run = make_people_run(tmp_path, per_item=1)
    run.post(pairs(12))
    mine = work(run, "ann", better)
    assert 0 < mine < 12
    assert work(run, "ann", better, stand_in=True) == 12 - mine
    assert len(run.ask(pairs(12))) == 12


def test_the_page_learns_nothing_that_would_bias(tmp_path: Path) -> None:
    gold = write_jsonl(
        tmp_path / "gold.jsonl",
        [{"prompt": f"Known {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(9)],
    )
    run = make_people_run(tmp_path, annotators=["ann"], repeats=1.0, gold=str(gold), gold_share=0.5)
    run.post(pairs(6))
    seen = set()

    def look(task: dict[str, Any], number: int) -> str:
        seen.add((frozenset(task), frozenset(task["answers"][0])))
        return "a"

    assert work(run, "ann", look) == 6 + 6 + 3
    names = {"id", "messages", "answers", "rubric"}, {"text", "cut_off"}
    assert seen == {tuple(map(frozenset, names))}
    found = figures(run.board)["annotators"]["ann"]
    assert found["steady"]["value"] == 0.0 and found["steady"]["count"] == 6
    assert found["took_a"]["value"] == 1.0 and found["gold_right"]["count"] == 3


def test_gold_measures(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "so better", "rejected": "no"} for i in range(4)]
    run = make_people_run(
        tmp_path, gold=str(write_jsonl(tmp_path / "g.jsonl", rows)), gold_share=1.0, per_item=2
    )
    run.post(pairs(4))
    work(run, "ann", better)
    work(run, "bob", lambda task, n: "b")
    found = figures(run.board)
    assert found["annotators"]["ann"]["gold_right"]["value"] == 1.0
    right = found["annotators"]["bob"]["gold_right"]
    assert right["count"] == 4 and right["value"] < 1.0
    assert found["agreement"]["items"] == 4  # gold counts towards no label and no agreement


def test_a_prompts_rubric_and_its_messages_are_shown(tmp_path: Path) -> None:
    messages = (Message("system", "Be brief."), Message("user", "Why?"))
    prompt = Prompt("p", "s", messages=messages, metadata={"rubric": "Brevity counts."})
    responses = [Response(f"r{k}", "p", f"\u202e{k}", (k,), "length") for k in range(2)]
    run = make_people_run(tmp_path, annotators=["ann"], rubric="Prefer facts.")
    run.post([(prompt, responses)])
    with run.board.open_log("ann") as log:
        state = Desk(run.board, log, "ann").state()
    assert state["rubric"] == "Prefer facts."
    assert state["task"]["rubric"] == "Brevity counts."
    assert [m["role"] for m in state["task"]["messages"]] == ["system", "user"]
    assert {a["text"] for a in state["task"]["answers"]} == {"\\u202e0", "\\u202e1"}
    assert all(a["cut_off"] for a in state["task"]["answers"])


def test_altered_questions_are_refused(tmp_path: Path) -> None:
    run = make_people_run(tmp_path)
    run.post(pairs(2))
    (path,) = (run.path / "annotation/items/round-001").glob("*.jsonl")
    path.write_text(path.read_text().replace("poor", "good"))
    with pytest.raises(CorruptError, match="part-00000"):
        run.board.parts("round-001")


def test_what_lies_on_the_disk_is_the_users_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        run = make_people_run(tmp_path)
        run.post(pairs(2))
        work(run, "ann", better)
        export_labels(run.board, tmp_path / "out.csv")
    finally:
        os.umask(old)
    found = [*(run.path / "annotation").rglob("*"), run.path / "annotation"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_dir()}
    assert modes == {0o700}
    files = [p for p in found if p.is_file()] + [tmp_path / "out.csv"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600} and len(files) >= 3


# --- other tools


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_labels_go_to_another_tool_and_come_back(tmp_path: Path, kind: str) -> None:
    run = make_people_run(tmp_path, per_item=2)
    asked = pairs(5)
    asked[0][1][0] = Response("odd", "p0", '=HYPERLINK("x"),\n"\u2028', (9,), "eos")
    run.post(asked)
    out = tmp_path / f"labels.{kind}"
    assert export_labels(run.board, out) == 10
    rows = read_rows_of(out)
    assert [row["verdict"] or "" for row in rows] == [""] * 10
    if kind == "csv":
        assert not [v for row in rows for v in row.values() if str(v).startswith("=")]
    for row in rows:
        row["verdict"] = "ab"["better" in row["b"]]
    write_rows_of(out, rows)
    assert import_labels(run.board, out) == 10
    assert import_labels(run.board, out) == 0
    labels = run.ask(asked)
    assert [c.p for label in labels for c in label.comparisons or ()] == [0.0] * 5
    export_labels(run.board, out)
    assert {row["verdict"] for row in read_rows_of(out)} == {"a", "b"}


def read_rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows_of(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_what_cannot_be_taken_over_is_named_and_nothing_is(tmp_path: Path) -> None:
    run = make_people_run(tmp_path, annotators=["ann"])
    run.post(pairs(2))
    tasks = [task.id for task in run.board.tasks("ann", "round-001")]
    path = tmp_path / "in.jsonl"

    def refused(*rows: dict[str, Any]) -> str:
        write_jsonl(path, list(rows))
        with pytest.raises(ConfigError) as caught:
            import_labels(run.board, path)
        return caught.value.message

    good = {"task": tasks[0], "verdict": "a"}
    assert "in.jsonl:2: verdict 'best' is none of a, b, tie, skip" in refused(
        good, {"task": tasks[1], "verdict": "best"}
    )
    assert "no task 'other'" in refused(good, {"task": "other", "verdict": "a"})
    assert "seconds 'long'" in refused({**good, "seconds": "long"})
    assert run.board.given("ann") == []
    work(run, "ann", lambda task, n: "tie")
    assert "has said 'tie'" in refused(good)
    run.ask(pairs(2))
    with pytest.raises(ConfigError, match=r"\.jsonl or \.csv"):
        export_labels(run.board, tmp_path / "labels.xlsx")


def test_a_repeat_comes_too_late_once_labels_are_made(tmp_path: Path) -> None:
    run = make_people_run(tmp_path, annotators=["ann"], repeats=1.0)
    run.post(pairs(2))
    tasks = run.board.tasks("ann", "round-001")
    path = tmp_path / "in.jsonl"
    rows = [{"task": task.id, "verdict": "a"} for task in tasks if task.purpose == "item"]
    assert import_labels(run.board, write_jsonl(path, rows)) == 2
    run.ask(pairs(2))
    write_jsonl(path, [{"task": t.id, "verdict": "a"} for t in tasks if t.purpose == "repeat"])
    with pytest.raises(ConfigError, match="labels of task .* are made"):
        import_labels(run.board, path)
    with run.board.open_log("ann") as log:
        assert Desk(run.board, log, "ann").state()["task"] is None


# --- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"annotators": []}, "at least 1"),
        ({"annotators": ["../x"]}, "no annotator's name"),
        ({"annotators": ["ann", "Ann"]}, "same name"),
        ({"annotators": ["ann"], "per_item": 2}, "needs as many annotators"),
        ({"annotators": ["ann"], "combine": "best"}, "judge.options.combine"),
        ({"annotators": ["ann"], "gold": "nowhere.jsonl"}, "does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    run = PeopleRun(tmp_path, options)
    with pytest.raises(ConfigError, match=words):
        run.labeller()


@pytest.mark.parametrize("setting", [{"orders": "one"}, {"votes": 3}, {"timeout_s": 5.0}])
def test_settings_that_people_do_not_read_are_refused(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    run = PeopleRun(tmp_path, {"annotators": ["ann"]})
    with pytest.raises(ConfigError, match=rf"judge\.{next(iter(setting))}"):
        run.labeller(**setting)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "chosen": "x"}, "'rejected'"),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "are equal"),
    ],
)
def test_gold_that_is_none_is_named_by_line(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    path = write_jsonl(tmp_path / "g.jsonl", [row])
    run = PeopleRun(tmp_path, {"annotators": ["ann"], "gold": str(path)})
    with pytest.raises(ConfigError, match=rf"g\.jsonl:1: .*{words}"):
        run.labeller()


def test_people_do_not_judge_evaluations(tmp_path: Path) -> None:
    run = make_people_run(tmp_path)
    config = {
        "model": {"init": {}},
        "sft": {"demonstrations": "quickstart_demonstrations.jsonl"},
        "prompts": {"train": [{"path": "quickstart.jsonl"}], "holdout": 4},
        "judge": {"name": "human", "options": run.options},
    }
    with pytest.raises(ConfigError, match=r"evaluation\.judge: people"):
        config_from_dict(config)
