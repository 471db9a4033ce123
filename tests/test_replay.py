"""Replay: verdicts of a file or of an earlier run, in both directions, and a campaign again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_fixture import make_run
from tiny import in_child, tiny_config

from judges.replay import UNRECORDED, Replay
from judges.scripted import Scripted
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score, Verdict
from online_dpo.store import RunDir
from online_dpo.tables import prompt_from_row, read_table, write_table

PROMPT = Prompt("p", "s", text="Say:")


def response(text: str, name: str = "r") -> Response:
    return Response(f"{name}-{text}", "p", text, (1,), "eos")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- files


def test_a_file_of_comparisons_counts_in_both_directions(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say:", "first": "a", "second": "b", "p": 0.8},
        {"prompt": "Say:", "first": "a", "second": "c", "p": None, "reason": "too close"},
        {"prompt": "Say:", "first": "a", "second": "b", "p": 0.1},
    ]
    judge = Replay(write(tmp_path / "v.jsonl", *rows))
    assert judge.kind == "compare"
    a, b, c = map(response, "abc")
    assert judge.compare(PROMPT, a, b) == Verdict(0.8)
    assert judge.compare(PROMPT, b, a).p == pytest.approx(0.2)
    assert judge.compare(PROMPT, c, a) == Verdict(None, "too close")
    assert judge.compare(PROMPT, b, c) == Verdict(None, UNRECORDED)
    elsewhere = Prompt("p", "s", text="Write:")
    assert judge.compare(elsewhere, a, b) == Verdict(None, UNRECORDED)


def test_a_file_of_scores_in_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "Say:", "response": "a", "score": 2.5}]
    rows += [{"prompt": "Say:", "response": "b", "score": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    judge = Replay(str(tmp_path / "s.parquet"))
    assert judge.kind == "score"
    assert judge.score(PROMPT, [response(text) for text in "abc"]) == [
        Score(2.5),
        Score(None, "no reason recorded"),
        Score(None, UNRECORDED),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "first": "a", "second": "b", "p": 7}, r"v\.jsonl:1: `p` cannot be 7"),
        ({"prompt": "x", "first": "a", "second": "b"}, "`p` is a number or null"),
        ({"prompt": "x", "first": 1, "second": "b", "p": 1}, "needs a text `first`"),
        ({"prompt": "x", "response": "a", "score": "good"}, "`score` is a number or null"),
        ({"prompt": "x", "response": "a", "score": True}, "`score` is a number or null"),
        ({"response": "a", "score": 1}, "needs a text `prompt`"),
    ],
)
def test_rows_that_are_no_judgements_are_named(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Replay(write(tmp_path / "v.jsonl", row))


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no judgements"):
        Replay(write(tmp_path / "empty.jsonl"))
    mixed = write(
        tmp_path / "mixed.jsonl",
        {"prompt": "x", "first": "a", "second": "b", "p": 1},
        {"prompt": "x", "response": "a", "score": 1},
    )
    with pytest.raises(ConfigError, match="both scores and comparisons"):
        Replay(mixed)
    with pytest.raises(ConfigError, match="is no run directory; leave it out"):
        Replay(mixed, part="labels")
    with pytest.raises(ConfigError, match="neither a run directory nor"):
        Replay(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="is no run directory"):
        Replay(str(tmp_path))


# --- runs


@pytest.mark.parametrize("kind", ["score", "compare"])
def test_a_run_gives_back_every_label(tmp_path: Path, kind: str) -> None:
    run = RunDir(make_run(tmp_path, judge=kind))
    judge = Replay(str(run.path), part="labels")
    assert judge.kind == kind
    origin = run.round(0).verify("prompts") / "prompts.parquet"
    prompts = {row["id"]: prompt_from_row(row) for row in read_table(origin)}
    seen = 0
    for round_dir in run.rounds():
        for shard in round_dir.children("labels"):
            samples = round_dir.path / shard.replace("labels", "samples") / "samples.parquet"
            by_id = {
                row["id"]: Response(row["id"], row["prompt_id"], row["text"], (1,), "eos")
                for row in read_table(samples)
            }
            for row in read_table(round_dir.path / shard / "labels.parquet"):
                prompt, first = prompts[row["prompt_id"]], by_id[row["first_id"]]
                if kind == "score":
                    assert judge.score(prompt, [first])[0].value == row["score"]
                else:
                    verdict = judge.compare(prompt, first, by_id[row["second_id"]])
                    assert verdict.p == row["p"]
                seen += 1
    assert seen > 20


def campaign(run_dir: str, judge: dict[str, Any]) -> None:
    import online_dpo

    online_dpo.run(tiny_config(Path(run_dir), judge=judge))


@pytest.mark.parametrize("kind", ["score", "compare"])
def test_a_replayed_campaign_trains_the_same_policies(tmp_path: Path, kind: str) -> None:
    judge: dict[str, Any] = {}
    if kind == "compare":
        cases = Path(__file__).parent / "judge_cases.py"
        members = [
            {"name": f"{cases}:Noisy", "label": f"noisy {n}", "options": {"seed": n}}
            for n in range(2)
        ]
        judge = {"name": "panel", "options": {"members": members, "vote": "mean"}}
    runs = [tmp_path / name / "run" for name in ("first", "again")]
    assert in_child(campaign, str(runs[0]), judge) == 0
    replay = {"name": "replay", "options": {"source": os.fspath(runs[0])}}
    assert in_child(campaign, str(runs[1]), replay) == 0
    policies = [[RunDir(run).round(n).ref("policy").sha256 for n in range(1, 3)] for run in runs]
    assert policies[0] == policies[1]
    metrics = [(run / "rounds/002/evaluation/metrics.json").read_text() for run in runs]
    assert metrics[0] == metrics[1]


# --- a verdict survives whatever holds it

P = st.none() | st.floats(0, 1)


@given(P, st.text(min_size=1), st.none() | st.text())
def test_a_verdict_survives_json_sqlite_and_parquet(
    tmp_path_factory: pytest.TempPathFactory, p: float | None, reason: str, raw: str | None
) -> None:
    import sqlite3

    verdict = Verdict(p, None if p is not None else reason, raw)
    data = json.loads(json.dumps({"p": verdict.p, "reason": verdict.reason, "raw": verdict.raw}))
    assert Verdict(**data) == verdict

    database = sqlite3.connect(":memory:")
    try:
        database.execute("CREATE TABLE verdicts (p REAL, reason TEXT, raw TEXT)")
        database.execute("INSERT INTO verdicts VALUES (:p, :reason, :raw)", data)
        assert Verdict(*database.execute("SELECT * FROM verdicts").fetchone()) == verdict
    finally:
        database.close()

    table = tmp_path_factory.getbasetemp() / "verdicts.parquet"
    columns = ("prompt_id", "prompt_source", "first_id", "second_id", "score", "orders")
    row: dict[str, Any] = dict.fromkeys((*columns, "order_ps", "vote_ps"))
    row |= {"p": p, "reason": verdict.reason, "raws": [] if raw is None else [raw]}
    write_table(table, "labels", [row])
    (stored,) = read_table(table)
    assert Verdict(stored["p"], stored["reason"], next(iter(stored["raws"]), None)) == verdict


@given(P)
def test_swapping_twice_is_the_same_verdict_and_once_turns_p(p: float | None) -> None:
    verdict = Verdict(p, "why")
    swapped = verdict.swap()
    assert swapped.p == (None if p is None else 1 - p)
    assert (swapped.p is None) or swapped.swap().p == pytest.approx(p, abs=1e-16)


# --- scripted


def test_a_script_is_checked_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="exactly one of scores and verdicts"):
        Scripted()
    with pytest.raises(ConfigError, match="exactly one of scores and verdicts"):
        Scripted(scores={}, verdicts=[])
    with pytest.raises(ConfigError, match=r"a scripted p lies in \[0, 1\] or is null, not 7"):
        Scripted(verdicts=[{"first": "a", "second": "b", "p": 7}])
    with pytest.raises(ConfigError, match="not 'x'"):
        Scripted(verdicts=[], default="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has first, second and p"):
        Scripted(verdicts=[{"first": "a", "p": 1}])


def test_a_script_is_read_in_both_orders_unless_it_says_otherwise() -> None:
    a, b = response("a"), response("b")
    judge = Scripted(verdicts=[{"first": "a", "second": "b", "p": 0.75}])
    assert judge.compare(PROMPT, a, b) == Verdict(0.75)
    assert judge.compare(PROMPT, b, a) == Verdict(0.25)
    assert judge.compare(PROMPT, a, a).p is None
    biased = [{"first": f, "second": s, "p": 1.0} for f, s in ("ab", "ba")]
    judge = Scripted(verdicts=biased)
    assert judge.compare(PROMPT, a, b).p == judge.compare(PROMPT, b, a).p == 1.0
    scores = Scripted(scores={"a": 1.0, "b": None}, default=3.0).score(
        PROMPT, [a, b, response("c")]
    )
    assert [score.value for score in scores] == [1.0, None, 3.0]
