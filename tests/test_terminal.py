"""What status, show and the end of a campaign print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_fixture import make_run
from tiny import in_child, tiny_config

from online_dpo.display.lookup import example_pairs, find_row, spread
from online_dpo.display.terminal import print_row, print_status, print_summary
from online_dpo.display.visible import visible
from online_dpo.display.wording import (
    change,
    drift,
    estimate,
    headline,
    number,
    percent,
    rate,
    remarks,
    seconds,
)
from online_dpo.errors import ConfigError
from online_dpo.files import read_json
from online_dpo.store import RunDir
from online_dpo.tables import read_table
from online_dpo.views import Campaign, RoundView

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]loud[/bold red]\r\u202eback\u2028end \x9b31m"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def status(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    print_status(Campaign(run))
    return capsys.readouterr().out


def test_a_row_a_round_with_its_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = status(run, capsys)
    figures = read_json(run / "rounds" / "003" / "evaluation" / "metrics.json")
    score, won = figures["score"], figures["win_rate_policy0"]
    row = next(line.split() for line in shown.splitlines() if line.startswith("    3  done"))
    assert row[2] == f"{score['mean']:.2f}" and row[4] == f"{score['stderr']:.2f}"
    assert row[5] == f"{100 * won['value']:.0f}%"
    assert row[6] == f"({100 * won['low']:.0f}-{100 * won['high']:.0f})"
    assert row[7:10] == ["12.0", "±", "0.3"]
    assert (
        sum(line.startswith(f"    {n}  done") for line in shown.splitlines() for n in range(4)) == 4
    )
    assert "finished, 3 of 3 rounds done" in shown


def test_status_as_json_counts_why_there_is_no_verdict(tmp_path: Path) -> None:
    rounds = Campaign(make_run(tmp_path, rounds=2)).status()["rounds"]
    assert [list(r["no_verdict"]) for r in rounds] == [[], ["no final answer"], ["no final answer"]]
    assert all(count > 0 for r in rounds for count in r["no_verdict"].values())


def test_the_way_on_names_the_trust_that_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = {"name": "mine:score"}
    run = make_run(tmp_path, rounds=3, finished=1, config={"judge": judge})
    command = f"online-dpo resume {run} --trust judge.name=mine:score"
    assert command in status(run, capsys)
    print_summary(Campaign(run))
    assert f"{command}  # go on" in capsys.readouterr().out


def test_labelling_and_judging_are_counted_as_they_go(tmp_path: Path) -> None:
    """A slow judge: its bar moves within a shard, and within an evaluation."""
    (tmp_path / "slow.py").write_text(
        "import time\ndef score(prompt, response):\n"
        "    time.sleep(0.025)\n    return float(len(response.text))\n"
    )
    config = tiny_config(tmp_path / "run", campaign={"rounds": 1}, sampling={"n": 8})
    config["judge"] = {"name": f"{tmp_path / 'slow.py'}:score"}
    seen = tmp_path / "seen.json"
    assert in_child(run_watched, config, str(seen)) == 0
    bars = json.loads(seen.read_text())
    assert [name for name, _ in bars][:2] == ["prompts", "sft"]
    label = next(counts for name, counts in bars if name == "label")
    assert label[-1] == 8 and any(0 < count < 4 for count in label), label
    evaluated = [counts for name, counts in bars if name == "evaluate"]
    assert all(counts[-1] == 8 for counts in evaluated)
    assert ["judge", [8]] in [[name, counts[-1:]] for name, counts in bars]


def run_watched(config: dict[str, Any], out: str) -> None:
    """Run, and write what every bar was set to."""
    import online_dpo
    from online_dpo.progress import SilentProgress

    bars: list[tuple[str, list[int]]] = []

    class Bar:
        def __init__(self, counts: list[int]) -> None:
            self.done = 0
            self.counts = counts

        def set(self, done: int, *, total: int | None = None) -> None:
            self.done = done
            self.counts.append(done)

    class Watched(SilentProgress):
        @contextmanager
        def stage(self, name: str, *, total: int, unit: str) -> Iterator[Any]:
            bars.append((name, []))
            yield Bar(bars[-1][1])

    online_dpo.run(config, progress=Watched())
    Path(out).write_text(json.dumps(bars))


def test_sources_have_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, rounds=1, sources=("films", "products"))
    shown = status(run, capsys)
    figures = read_json(run / "rounds/001/evaluation/metrics.json")["by_source"]["films"]
    after = shown[shown.index("round 1 by source") :]
    row = next(line.split() for line in after.splitlines() if line.startswith("films"))
    assert row[:2] == ["films", "6"] and row[2] == f"{figures['score']['mean']:.2f}"
    assert f"{figures['distinct_2']:.2f}" in row
    assert all(len(line) <= 80 for line in after.splitlines() if str(run) not in line)
    assert "by source" not in status(make_run(tmp_path / "one", rounds=1), capsys)


def test_a_narrow_output_drops_columns_and_names_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = status(run, capsys)
    wide = [line for line in shown.splitlines() if len(line) > 80]
    assert wide == [line for line in wide if str(run) in line]
    assert "…" not in shown
    assert "No room at 80 columns for: vs previous, KL to ref" in shown
    assert "0.693 → 0.383" not in shown


def test_a_wide_output_has_all_columns(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = status(run, capsys)
    assert "No room" not in shown
    assert "0.693 → 0.383" in shown


def test_models_are_named_by_place_and_hash(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = status(run, capsys)
    policy = read_json(run / "rounds" / "003" / "policy" / "manifest.json")["sha256"]
    reference = read_json(run / "rounds" / "002" / "policy" / "manifest.json")["sha256"]
    assert f"rounds/003/policy  sha256 {policy[:12]}\n" in shown
    assert f"rounds/002/policy  sha256 {reference[:12]}\n" in shown


def test_responses_are_counted_by_fate_and_reconcile(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = status(run, capsys)
    titles = next(
        line.split() for line in shown.splitlines() if line.startswith("round  responses")
    )
    assert titles == ["round", "responses", "paired", "not", "selected", "tied", "invalid"]
    row = next(line.split() for line in shown.splitlines() if line.startswith("  all  "))
    counts = [int(cell) for cell in row[1:]]
    assert counts[0] == sum(counts[1:]) == 3 * 32
    assert "round 1: 2 without a verdict: no final answer" in shown


def test_the_fixed_cost_of_a_round_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = status(run, capsys)
    # 8 s less 2.25 + 0.4 + 0.1 + 3.5 + 1.1 s.
    assert "    2   2.2 s  0.40 s  0.10 s   3.5 s     1.1 s  0.65 s   8.0 s" in shown


def test_an_unfinished_round_says_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, finished=1)
    shown = status(run, capsys)
    assert "stopped, 1 of 3 rounds done" in shown
    assert "round 2, sample (16 of 32 responses sampled)" in shown
    assert f"online-dpo resume {run}" in shown
    assert "    2  sample  " in shown


def test_a_run_without_rounds_prints_its_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, rounds=1)
    (tmp_path / "fresh").mkdir()
    for name in ("versions.json", "campaign.yaml"):
        (tmp_path / "fresh" / name).write_bytes((run / name).read_bytes())
    assert "0 of 1 rounds done" in status(tmp_path / "fresh", capsys)


def test_a_comparing_judge_has_win_rates_and_no_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = status(make_run(tmp_path, rounds=1, judge="compare"), capsys)
    assert "reward" not in shown
    assert "wins vs 0" in shown and "against policy 0." in shown.replace("\n", " ")


def test_the_summary_shows_answers_and_the_next_commands(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(Campaign(run), note="It was finished already.")
    shown = capsys.readouterr().out
    first = read_table(run / "rounds" / "000" / "evaluation" / "answers.parquet")
    last = read_table(run / "rounds" / "003" / "evaluation" / "answers.parquet")
    assert shown.startswith("It was finished already.\n")
    assert shown.count("held-out prompt\n") == 3
    for old, new in list(zip(first, last, strict=True))[:3]:
        assert f"policy 0 (score {old['score']:.2f}):\n  {old['text']}\n" in shown
        assert f"round 3 (score {new['score']:.2f}):\n  {new['text']}\n" in shown
    assert f"online-dpo report {run}" in shown
    assert f"online-dpo export {run} --out {run}-export" in shown


def test_a_long_campaign_is_summed_up_in_few_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(Campaign(make_run(tmp_path, rounds=15)))
    shown = capsys.readouterr().out
    rows = [line.split()[0] for line in shown.splitlines() if "  done " in line]
    assert rows == ["0", *map(str, range(5, 16))]
    assert "4 rounds are left out here" in shown


def test_a_long_answer_is_cut_with_what_is_missing_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(Campaign(make_run(tmp_path, rounds=1, odd_answer="abcd " * 200)))
    assert "[... 400 more characters; the report has them]" in capsys.readouterr().out


def test_models_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, rounds=1, odd_answer=HOSTILE, sources=(HOSTILE,))
    pair = read_table(run / "rounds" / "001" / "pairs" / "pairs.parquet")[0]
    print_summary(Campaign(run))
    print_row(Campaign(run), pair["pair_id"])
    shown = capsys.readouterr().out
    escaped = r"\x1b[2J\x1b]0;owned\x07[bold red]loud[/bold red]\x0d\u202eback\u2028end \x9b31m"
    assert shown.count(escaped) == 4
    assert {c for c in shown if unicodedata.category(c).startswith("C")} == {"\n"}


def test_a_pair_is_shown_with_its_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = read_table(run / "rounds" / "002" / "pairs" / "pairs.parquet")[3]
    print_row(Campaign(run), pair["pair_id"][:7])
    shown = capsys.readouterr().out
    labels = read_table(run / "rounds" / "002" / "labels" / "part-00000" / "labels.parquet")
    scores = {row["first_id"]: row["score"] for row in labels}
    assert f"pair {pair['pair_id']}: trained on in round 2, from the samples of round 2" in shown
    assert f"margin {pair['margin']:.3f}" in shown
    for side in ("chosen", "rejected"):
        tokens, score = len(pair[f"{side}_token_ids"]), scores[pair[f"{side}_id"]]
        title = next(line for line in shown.splitlines() if line.startswith(f"{side}: "))
        assert title.startswith(f"{side}: {tokens} tokens")
        assert title.endswith(f"score {score:.3f} (three sentences)")
        assert f"\n  {pair[f'{side}_text']}\n" in shown


def test_a_compared_pair_is_shown_with_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, rounds=1, judge="compare", form="messages")
    pair = read_table(run / "rounds" / "001" / "pairs" / "pairs.parquet")[0]
    print_row(Campaign(run), pair["pair_id"])
    shown = capsys.readouterr().out
    assert f"judge: p {pair['p']:.3f} that the chosen one is better, over 2 orders" in shown
    assert "\n  user: Review of the " in shown


def test_a_pair_mixed_in_later_names_all_its_rounds(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    folder = run / "rounds" / "003" / "pairs"
    first = run / "rounds" / "001" / "pairs" / "pairs.parquet"
    (folder / "pairs.parquet").write_bytes(first.read_bytes())
    pair = find_row(run, read_table(first)[0]["pair_id"])
    assert pair.rounds == (1, 3)
    assert pair.chosen.score is not None


def test_an_unknown_pair_names_near_ones(run: Path) -> None:
    known = read_table(run / "rounds" / "001" / "pairs" / "pairs.parquet")[0]["pair_id"]
    wrong = known[:10] + "zz" + known[12:]
    with pytest.raises(ConfigError, match=f"is no row's id .* Near: {known}"):
        find_row(run, wrong)
    with pytest.raises(ConfigError, match="more than one row's id"):
        find_row(run, "")


def test_example_pairs_go_from_the_widest_to_the_narrowest_margin(run: Path) -> None:
    margins = sorted(
        row["margin"] for row in read_table(run / "rounds" / "001" / "pairs" / "pairs.parquet")
    )
    shown = [pair.margin for pair in example_pairs(run, 1, 3)]
    assert shown == [margins[-1], margins[len(margins) // 2], margins[0]]
    assert example_pairs(run, 0, 3) == []


@pytest.mark.parametrize(
    ("length", "count", "indices"),
    [(7, 3, [0, 3, 6]), (2, 3, [0, 1]), (5, 1, [0]), (0, 3, []), (10, 4, [0, 3, 6, 9])],
)
def test_spread(length: int, count: int, indices: list[int]) -> None:
    assert spread(length, count) == indices


def test_figures_by_hand() -> None:
    assert rate({"value": 0.9725, "low": 0.934, "high": 0.989}) == "97% (93-99)"
    assert estimate({"mean": -1.996, "stderr": 0.051}) == "-2.00 ± 0.05"
    assert estimate({"mean": 0.0412, "stderr": 0.0123}) == "0.041 ± 0.012"
    assert estimate({"mean": 312.3, "stderr": 21.04}) == "312.3 ± 21.0"
    assert drift({"mean": 0.0123, "stderr": 0.004}) == "0.012 ± 0.004"
    assert drift({"mean": 31.27, "stderr": 1.02}) == "31.3 ± 1.0"
    assert number(-0.001) == "0.00" and number(None) == "-"
    assert percent(0.005) == "0%" and percent(1.0) == "100%"
    assert [seconds(s) for s in (0.25, 12.34, 125.0, 12000.0)] == [
        "0.25 s", "12.3 s", "2 min 05 s", "3 h 20 min",
    ]  # fmt: skip
    assert change(0.6931, 0.5) == "0.69 → 0.50" and change(None, 0.5) == "-"


def views(*figures: dict[str, Any]) -> list[RoundView]:
    empty = RoundView(
        round=0, stage="done", prompts=0, samples=0, pairs=0, unpaired=0, responses={},
        no_verdict={},
        policy=None, reference=None, promoted=None, why=None, training=None, evaluation=None,
        judge=None, alarms=[], wall_s=None, busy_s={}, fixed_s=None,
    )  # fmt: skip
    return [
        replace(empty, round=n, evaluation={"win_rate_policy0": None, "score": None, **found})
        for n, found in enumerate(figures)
    ]


def won(value: float, low: float, high: float) -> dict[str, Any]:
    return {"win_rate_policy0": {"value": value, "low": low, "high": high, "count": 128}}


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        (
            won(0.97, 0.93, 0.99) | {"score": {"mean": 5.44, "stderr": 0.1}},
            "After 1 round the policy wins 97% (95% interval 93-99%) of 128 held-out prompts "
            "against policy 0; reward -2.00 → 5.44.",
        ),
        (won(0.52, 0.44, 0.6), "against policy 0. That does not tell the two apart."),
        (won(0.2, 0.14, 0.28), "against policy 0. It has become worse."),
        ({}, "could not be compared with policy 0: the judge gave no verdict."),
    ],
)
def test_the_headline_says_no_more_than_the_interval(
    figures: dict[str, Any], sentence: str
) -> None:
    rounds = views({"score": {"mean": -2.0, "stderr": 0.1}}, figures)
    assert headline(rounds).endswith(sentence)


def test_the_headline_before_anything_was_trained() -> None:
    assert headline([]) == "Nothing has been evaluated yet."
    rounds = views({"score": {"mean": -2.0, "stderr": 0.1}})
    assert headline(rounds) == "Only policy 0 has been evaluated yet. Its reward is -2.00."


def test_remarks_name_what_went_wrong() -> None:
    before = {"distinct_2": 0.8, "truncated": 0.0, "mean_tokens": 30.0}
    after = {
        **won(0.7, 0.6, 0.78), "distinct_2": 0.3, "truncated": 0.4, "mean_tokens": 90.0,
        "invalid": 5, "prompts": 128,
    }  # fmt: skip
    rounds = views(before, won(0.95, 0.9, 0.98), after)
    rounds[-1] = replace(rounds[-1], training={"last_chosen_reward": -0.31})
    text = "\n".join(remarks(rounds))
    assert "Round 1 won more against policy 0 (95% (90-98)) than round 2 (70% (60-78))" in text
    assert "distinct-2 fell from 0.80 to 0.30" in text
    assert "40% of the answers are cut off" in text
    assert "from 30.0 to 90.0 tokens" in text
    assert "no verdict on 5 of 128" in text
    assert "chosen reward -0.31" in text


def test_a_campaign_that_went_well_has_no_remarks() -> None:
    first = {"distinct_2": 0.8, "truncated": 0.02, "mean_tokens": 30.0, "invalid": 0}
    last = {**won(0.97, 0.9, 0.99), "distinct_2": 0.6, "truncated": 0.01, "mean_tokens": 28.0}
    rounds = views(first, won(0.98, 0.91, 0.99), last)
    rounds[-1] = replace(rounds[-1], training={"last_chosen_reward": 0.4})
    assert remarks(rounds) == []


@given(st.text())
def test_visible_text_holds_no_controls_and_changes_nothing_else(text: str) -> None:
    shown = visible(text)
    assert not {c for c in shown if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
    if text.isprintable():
        assert shown == text


def test_scripts_that_need_joiners_stay_readable() -> None:
    assert visible("می‌خواهم 👩‍🔬\n\tx") == "می‌خواهم 👩‍🔬\n\tx"


def in_a_process(run: Path, code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", f"run = {str(run)!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    ).stdout


def test_status_loads_no_heavy_library(run: Path) -> None:
    code = (
        "import sys\nfrom online_dpo.display.terminal import print_status\n"
        "from online_dpo.views import Campaign\nprint_status(Campaign(run))\nprint(*sys.modules)"
    )
    loaded = {name.split(".")[0] for name in in_a_process(run, code).splitlines()[-1].split()}
    assert "online_dpo" in loaded
    assert not loaded & {"torch", "transformers", "vllm", "openai", "datasets", "pyarrow", "numpy"}


def test_an_output_without_unicode_still_gets_its_table(run: Path) -> None:
    code = (
        "from online_dpo.display.terminal import print_summary\n"
        "from online_dpo.views import Campaign\n"
        "print_summary(Campaign(run))"
    )
    shown = in_a_process(run, code, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert "2.50" in shown and shown.isascii()


def test_reading_a_run_writes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in RunDir(run).path.rglob("*")}
    print_status(Campaign(run))
    print_summary(Campaign(run))
    assert {path: path.stat().st_mtime_ns for path in RunDir(run).path.rglob("*")} == before
