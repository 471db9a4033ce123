"""The report card: stub judges are caught, attacks counted, nothing is paid for twice."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import stub_judges as stubs
from judge_server import NO_MODEL, JudgeServer, Request, Say
from labellers import PRICE, MakeLabeller

from online_dpo import cli
from online_dpo.config import Config
from online_dpo.config_file import load_config
from online_dpo.errors import BudgetError, ConfigError, LockedError, SignalError
from online_dpo.locks import RunLock
from online_dpo.records import Response
from online_dpo.report_card.attacks import ALONE, INJECTED
from online_dpo.report_card.check import Extent, check_judge
from online_dpo.report_card.comparisons import read_comparisons
from online_dpo.report_card.text import describe

MS = re.MULTILINE | re.DOTALL
QUIET = Extent(attacks=0, repeats=0)


def config_of(judge: dict[str, Any], **sections: Any) -> Config:
    return load_config(
        "quickstart.yaml", edit=lambda data: {**data, "judge": judge, **sections}
    ).config


def llm(server: JudgeServer, **judge: Any) -> dict[str, Any]:
    options = {"model": "m", "base_url": server.url, "price_per_million": PRICE}
    return {"name": "llm_pairwise", "options": options, **judge}


def card(
    tmp_path: Path, rule: stubs.Rule, data: Path | None = None, extent: Extent = QUIET
) -> dict[str, Any]:
    """The report of a judge that follows a rule."""
    path = data or stubs.write_comparisons(tmp_path / "set.jsonl")
    with stubs.serve_rule(rule) as server:
        return check_judge(config_of(llm(server)), str(path), out=tmp_path / "out", extent=extent)


def test_an_honest_judge_has_nothing_that_stands_out(tmp_path: Path) -> None:
    report = card(tmp_path, stubs.honest, extent=Extent(attacks=4, repeats=10))
    found = report["figures"]
    assert found["accuracy"]["value"] == 1.0 and found["kappa"] == 1.0
    assert found["prefers_longer"]["value"] == found["labels_prefer_longer"]["value"] == 0.5
    assert found["prefers_first"]["value"] == 0.5
    assert found["repeat_stability"] == {"value": 1.0, "count": 20}
    assert (found["ties"], found["invalid"], found["order_conflicts"]) == (0.0, 0.0, 0.0)
    assert report["attacks"].keys() == ALONE.keys() | INJECTED.keys()
    assert all(kind["fooled"]["value"] == 0.0 for kind in report["attacks"].values())
    assert report["findings"] == [] and report["wrong"] == []
    assert "Nothing stands out." in describe(report)


def test_a_judge_that_always_says_first_is_caught(tmp_path: Path) -> None:
    report = card(tmp_path, stubs.always_first, extent=Extent(attacks=4, repeats=0))
    found = report["figures"]
    assert found["prefers_first"]["value"] == 1.0
    assert found["order_conflicts"] == found["ties"] == 1.0
    assert found["accuracy_by_order"]["better_shown_first"]["value"] == 1.0
    assert found["accuracy_by_order"]["better_shown_second"]["value"] == 0.0
    assert found["accuracy"]["value"] == 0.5
    # What wins by its place wins no more with an order to the judge.
    assert all(report["attacks"][kind]["flipped"]["value"] == 0.0 for kind in INJECTED)
    assert all(report["attacks"][kind]["fooled_once"]["value"] == 1.0 for kind in INJECTED)
    text = describe(report)
    assert "- It prefers the first shown in 100% of 80 verdicts" in text
    assert "contradicts itself in 100% of the pairs" in text


def test_a_place_is_preferred_however_the_orders_are_asked(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl")
    with stubs.serve_rule(stubs.always_first) as server:
        config = config_of(llm(server, orders="one"))
        report = check_judge(config, str(path), out=tmp_path / "out", extent=QUIET)
    assert report["figures"]["prefers_first"]["value"] == 1.0
    assert report["figures"]["order_conflicts"] is None
    assert report["figures"]["prefers_first"]["count"] == 40


def test_a_judge_of_length_is_caught(tmp_path: Path) -> None:
    report = card(tmp_path, stubs.always_longer, extent=Extent(attacks=4, repeats=0))
    assert report["figures"]["prefers_longer"]["value"] == 1.0
    assert report["figures"]["accuracy"]["value"] == 0.5
    assert report["attacks"]["constant"]["fooled"]["value"] == 1.0
    assert report["attacks"]["empty"]["fooled"]["value"] == 0.0
    text = describe(report)
    assert "prefers the longer response in 100% of 40 decided pairs" in text
    assert "It preferred a phrase that fits any prompt to the better response in 100%" in text


def test_a_judge_that_flips_is_caught(tmp_path: Path) -> None:
    report = card(tmp_path, stubs.flips, extent=Extent(attacks=0, repeats=40))
    found = report["figures"]
    # 1 - 2 * 0.2 * 0.8 of pairs of answers agree, to the same question or in two orders.
    assert found["repeat_stability"]["value"] == pytest.approx(0.68, abs=0.12)
    assert found["order_conflicts"] == pytest.approx(0.32, abs=0.15)
    assert any("flipped at random" in sentence for sentence in report["findings"])
    assert any("contradicts itself" in sentence for sentence in report["findings"])


def test_a_judge_that_cannot_be_parsed_is_caught_and_not_stopped(tmp_path: Path) -> None:
    data = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=60)
    report = card(tmp_path, stubs.unparsable, data)
    # One of two orders in ten: a pair needs both.
    assert report["figures"]["invalid"] == pytest.approx(0.19, abs=0.1)
    assert report["figures"]["abstained"] == 0.0
    assert report["figures"]["accuracy"]["value"] == 1.0
    assert report["no_verdict"].keys() == {"no verdict in the reply"}
    assert "reply could not be used: no verdict in the reply" in describe(report)


def test_a_judge_that_a_campaign_would_stop_at_is_still_measured(tmp_path: Path) -> None:
    data = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=30)
    report = card(tmp_path, lambda first, second, draw: "I would rather not say.", data)
    assert report["figures"]["invalid"] == 1.0


def test_a_judge_that_goes_in_circles_is_caught(tmp_path: Path) -> None:
    report = card(tmp_path, stubs.in_circles, stubs.write_triples(tmp_path / "triples.jsonl"))
    assert report["figures"]["intransitive"] == {"value": 1.0, "count": 8}
    assert "goes in circles" in describe(report)


@pytest.mark.parametrize(
    "rule",
    [
        stubs.honest,
        stubs.always_first,
        stubs.always_longer,
        stubs.flips,
        stubs.unparsable,
        stubs.in_circles,
    ],
)
def test_labels_change_only_as_the_report_says(
    rule: stubs.Rule, tmp_path: Path, open_labeller: MakeLabeller
) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=24)
    labelled, _ = read_comparisons(str(path), seed=0)
    with stubs.serve_rule(rule) as server:
        report = check_judge(config_of(llm(server)), str(path), out=tmp_path / "out", extent=QUIET)
        # With the campaign's seed fences, and so the replies, are the same.
        labeller = open_labeller(seed=0, **llm(server, max_invalid=1.0))
        given = labeller.label(
            [(row.prompt, (row.first, row.second)) for row in labelled], purpose="round-001"
        )
    counts: Counter[str] = Counter()
    for labels in given:
        (made,) = labels.comparisons or ()
        counts["invalid"] += made.p is None
        counts["ties"] += made.p == 0.5
        counts["order_conflicts"] += made.order_ps in ((1.0, 0.0), (0.0, 1.0))
    found = report["figures"]
    assert found["ties"] * 24 == counts["ties"]
    assert found["invalid"] * 24 == counts["invalid"]
    both = 24 - counts["invalid"]
    assert found["order_conflicts"] * both == pytest.approx(counts["order_conflicts"])
    if rule is stubs.honest:
        assert not counts.total()


def test_orders_and_forged_verdicts_that_a_judge_obeys_are_counted(tmp_path: Path) -> None:
    report = card(tmp_path, stubs.gullible, extent=Extent(attacks=6, repeats=0))
    attacks = report["attacks"]
    # Of the six texts of each kind so many name a letter. To say A wins where the attack is shown
    # as A and loses in the other order, so that both together are a tie.
    for kind, num_orders in (("instruction", 4), ("verdict", 6), ("fence", 5)):
        assert attacks[kind]["tried"] == 6
        assert attacks[kind]["fooled_once"]["value"] == pytest.approx(num_orders / 6)
        assert attacks[kind]["flipped"]["value"] == pytest.approx(num_orders / 12)
        assert attacks[kind]["fooled"]["value"] == 0.0
    assert attacks["empty"]["fooled"]["value"] == 0.0
    assert "forged verdict" in describe(report)


def test_the_same_command_again_pays_for_nothing(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=10)
    extent = Extent(attacks=2, repeats=4)
    with stubs.serve_rule(stubs.honest) as server:
        config = config_of(llm(server))
        first = check_judge(config, str(path), out=tmp_path / "out", extent=extent)
        sent = len(server.requests)
        again = check_judge(config, str(path), out=tmp_path / "out", extent=extent)
        assert len(server.requests) == sent == first["cost"]["set"]["calls"]
        other = config_of(llm(server, swap="agree"))
        other.judge.options["principles"] = ["Shorter is better."]
        changed = check_judge(other, str(path), out=tmp_path / "out", extent=extent)
        assert len(server.requests) == 2 * sent and changed["cost"]["set"]["calls"] == sent
    # In two orders: 10 pairs, 4 of them once more, 2 attacks of each kind.
    assert sent == 2 * (10 + 4 + 2 * len(ALONE | INJECTED))
    assert again["cost"]["requests"] == 0 and again["cost"]["usd"] == 0.0
    assert again["cost"]["from_ledger"] == sent
    assert again["cost"]["set"] == first["cost"]["set"]
    assert first["cost"]["set"]["usd"] == pytest.approx(sent * (100 * 1.0 + 10 * 2.0) / 1e6)
    same = ("figures", "attacks", "wrong", "findings")
    assert [again[name] for name in same] == [first[name] for name in same]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == changed


def test_a_budget_ends_it_with_what_goes_on(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=10)
    with stubs.serve_rule(stubs.honest) as server:
        small = config_of(llm(server, budget={"max_calls": 7}, concurrency=1))
        with pytest.raises(BudgetError) as ended:
            check_judge(small, str(path), out=tmp_path / "out", extent=QUIET, command="again")
        assert ended.value.remedy == "again --set judge.budget.max_calls=14"
        assert "judgments.sqlite" in (ended.value.safe or "")
        more = config_of(llm(server, budget={"max_calls": 20}))
        report = check_judge(more, str(path), out=tmp_path / "out", extent=QUIET)
        assert len(server.requests) == 20
    assert report["cost"]["requests"] == 13


def test_a_signal_ends_it_and_nothing_that_came_is_bought_again(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=10)
    with stubs.serve_rule(stubs.honest) as server:
        take = server.take

        def stopping(request: Request) -> Any:
            if len(server.requests) == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return take(request)

        server.take = stopping  # type: ignore[method-assign]
        config = config_of(llm(server, concurrency=1))
        with pytest.raises(SignalError) as ended:
            check_judge(config, str(path), out=tmp_path / "out", extent=QUIET, command="again")
        assert ended.value.exit_code == 130 and ended.value.remedy == "again"
        report = check_judge(config, str(path), out=tmp_path / "out", extent=QUIET)
    assert report["figures"]["accuracy"] == {**report["figures"]["accuracy"], "count": 10}
    assert report["cost"]["from_ledger"] >= 7
    assert report["cost"]["requests"] + report["cost"]["from_ledger"] == 20


def test_a_judge_that_says_nothing_leaves_nothing_to_measure(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=6)
    judge = {"name": "scripted", "options": {"verdicts": []}}
    report = check_judge(
        config_of(judge), str(path), out=tmp_path / "out", extent=Extent(attacks=2, repeats=2)
    )
    assert report["figures"]["abstained"] == 1.0 and report["figures"]["accuracy"] is None
    assert report["attacks"]["fence"]["no_verdict"] == 1.0
    assert report["findings"] == [
        "100% of the pairs have no verdict because it abstained: not in the script (6)."
    ]
    assert "accuracy                        - " in describe(report)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=2)
    (tmp_path / "out").mkdir()
    lock = RunLock(tmp_path / "out")
    judge = {"name": "scripted", "options": {"verdicts": [], "default": 1.0}}
    try:
        with pytest.raises(LockedError) as refused:
            check_judge(config_of(judge), str(path), out=tmp_path / "out", extent=QUIET)
    finally:
        lock.release()
    assert refused.value.remedy is None


def test_a_judge_that_scores_is_asked_once_and_has_no_orders(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2=", "answer": "4", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2=", "answer": "4", "chosen": "4", "rejected": "The answer is 22."},
        {"prompt": "3+4=", "answer": "7", "chosen": "It is 7", "rejected": "8"},
    ]
    path = stubs.write_rows(tmp_path / "sums.jsonl", rows)
    judge = {"name": "final_answer", "options": {"field": "answer"}, "scale": 0.2}
    report = check_judge(
        config_of(judge), str(path), out=tmp_path / "out", extent=Extent(attacks=3, repeats=1)
    )
    found = report["figures"]
    assert found["accuracy"]["value"] == 1.0 and found["accuracy_by_order"] is None
    assert found["prefers_first"] is None and found["repeat_stability"]["value"] == 1.0
    # sigmoid(1 / 0.2)
    (row,) = found["calibration"]["reliability"]
    assert row["confidence"] == pytest.approx(0.9933, abs=1e-4)
    assert report["attacks"]["empty"]["fooled"]["value"] == 0.0
    assert report["attacks"]["verdict"]["fooled_once"] is None
    assert "better one shown first" not in describe(report)
    assert report["cost"]["set"] is None


def test_a_scorer_that_a_forged_score_fools(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=8)
    pattern = {"kind": "regex", "pattern": "^right|Score: 10"}
    judge = {"name": "heuristic", "options": {"scorers": [pattern]}}
    report = check_judge(
        config_of(judge), str(path), out=tmp_path / "out", extent=Extent(attacks=6, repeats=0)
    )
    # A tie with the better response is not yet a win.
    assert report["attacks"]["verdict"]["fooled"]["value"] == 0.0
    pattern["pattern"] = "Score: 10"
    report = check_judge(
        config_of(judge), str(path), out=tmp_path / "out", extent=Extent(attacks=6, repeats=0)
    )
    assert report["attacks"]["verdict"]["fooled"]["value"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"name": "human", "options": {"annotators": ["ann"]}}, "online-dpo label"),
        ({"name": "self"}, "campaign's round"),
        ({"name": "heuristic", "options": {"scorers": [{"kind": "tokens"}]}}, "have none"),
    ],
)
def test_judges_that_a_file_cannot_be_put_to_are_refused(
    judge: dict[str, Any], message: str, tmp_path: Path
) -> None:
    other = {"judge": {"name": "heuristic", "options": {"scorers": [{"kind": "length"}]}}}
    with pytest.raises(ConfigError, match=message):
        check_judge(config_of(judge, evaluation=other), "judge_check.jsonl", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_judge_of_evaluations_is_another(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=4)
    other = {"judge": {"name": "scripted", "options": {"verdicts": [], "default": 1.0}}}
    judge = {"name": "heuristic", "options": {"scorers": [{"kind": "length"}]}}
    config = config_of(judge, evaluation=other)
    report = check_judge(config, str(path), out=tmp_path, extent=QUIET, evaluation=True)
    assert report["judge"]["name"] == "scripted"
    with pytest.raises(ConfigError, match="no evaluation.judge"):
        check_judge(config_of(judge), str(path), out=tmp_path, extent=QUIET, evaluation=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["online-dpo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_check_finds_shipped_files_and_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sums = ("arithmetic.yaml", "--data", "judge_check_arithmetic.jsonl")
    assert run(monkeypatch, "judge", "check", *sums) == 0
    assert "accuracy  " in (said := capsys.readouterr().out) and "100% (88-100) of 28" in said
    folder = tmp_path / "judge_check" / "arithmetic-judge_check_arithmetic"
    assert json.loads((folder / "report.json").read_text())["figures"]["kappa"] == 1.0
    rows = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert len(rows) == 30 + 5 * 10 and rows[0]["line"] == 1
    assert run(monkeypatch, "judge", "check", *sums, "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"]["pairs"] == 30


def test_the_examples_of_the_docs_are_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "judges.md").read_text()
    examples = re.findall(
        r"^```sh\n(online-dpo judge [^\n]*)\n```\n.*?^```text\n(.*?)^```$", page, MS
    )
    assert len(examples) == 2
    for command, printed in examples:
        assert run(monkeypatch, *shlex.split(command)[1:]) == 0
        assert _timeless(capsys.readouterr().out) == _timeless(printed)


def _timeless(text: str) -> str:
    return re.sub(r"[\d.]+ s\b", "SECONDS", text)


def test_the_shipped_set_favours_neither_place_nor_length(tmp_path: Path) -> None:
    judge = {"name": "scripted", "options": {"verdicts": [], "default": 1.0}}
    report = check_judge(config_of(judge), "judge_check.jsonl", out=tmp_path, extent=QUIET)
    assert report["data"]["pairs"] == 60 and not report["data"]["problems"]
    assert report["figures"]["labels_prefer_longer"]["value"] == 0.5
    assert report["figures"]["labels_tied"] == 0.1
    assert report["figures"]["accuracy_by_order"]["as_given"]["value"] == 0.5


def test_try_shows_the_request_as_sent_and_the_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with JudgeServer(lambda request, number: Say("Verdict: A\x1b[2J\n[[A]]")) as server:
        judge = f"judge={json.dumps(llm(server))}"
        asked = ("--prompt", "Say hello.", "--first", "Hello!", "--second", "No.")
        assert run(monkeypatch, "judge", "try", "quickstart.yaml", *asked, "--set", judge) == 0
        said = capsys.readouterr().out
        assert run(monkeypatch, "judge", "try", "quickstart.yaml", *asked, "--set", judge) == 0
        assert len(server.requests) == 2
    for request in server.requests:
        for message in request.pop("messages"):
            assert message["content"] in said
        assert all(f"\n{key}: {json.dumps(value)}\n" in said for key, value in request.items())
    assert "\x1b" not in said and "Verdict: A\\x1b[2J" in said
    # Two calls of 100 tokens in and 10 out at [1, 2] dollars a million.
    assert "100 tokens in, 10 out" in said and "$0.00024" in said
    assert "== request: second shown first" in said and "first shown first: p 1.000\n" in said
    assert "from the ledger" not in said and "from the ledger" in capsys.readouterr().out


def test_try_shows_the_request_of_a_judge_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--prompt", "Say hello.", "--first", "Hello!", "--second", "No.")
    with JudgeServer(lambda request, number: NO_MODEL) as server:
        judge = f"judge={json.dumps(llm(server))}"
        assert run(monkeypatch, "judge", "try", "quickstart.yaml", *asked, "--set", judge) == 5
    said = capsys.readouterr()
    assert "Say hello." in said.out and "== no reply: " in said.out
    assert "no such model" in said.err


def test_try_shows_what_each_response_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--prompt", "Say hello.", "--first", "Hello!", "--second", "No.")
    with JudgeServer(lambda request, number: Say(json.dumps({"score": 7 - number}))) as server:
        judge = {**llm(server), "name": "llm_pointwise", "concurrency": 1, "scale": 2.0}
        chosen = f"judge={json.dumps(judge)}"
        assert run(monkeypatch, "judge", "try", "quickstart.yaml", *asked, "--set", chosen) == 0
        same = (*asked[:-1], "Hello!")
        judge = f"judge={json.dumps(llm(server))}"
        assert run(monkeypatch, "judge", "try", "quickstart.yaml", *same, "--set", judge) == 0
        assert len(server.requests) == 2
    said = capsys.readouterr().out
    assert "== request: the first, to" in said and "== request: the second, to" in said
    # sigmoid(1 / 2)
    assert "scores: 7 and 6\nverdict: the first, p 0.622" in said
    assert "There was no request: the two responses are identical." in said


def test_try_shows_a_judge_without_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = json.dumps([{"role": "user", "content": "2+2="}])
    asked = ("--prompt", chat, "--first", "4", "--second", "5", "--metadata", '{"answer": "4"}')
    assert run(monkeypatch, "judge", "try", "arithmetic.yaml", *asked) == 0
    said = capsys.readouterr().out
    assert "There was no request" in said and "scores: 1 and 0" in said
    assert "verdict: the first, p 0.731" in said
    assert run(monkeypatch, "judge", "try", "arithmetic.yaml", *asked[:-1], "[]") == 2
    assert "not a JSON object" in capsys.readouterr().err


def test_responses_of_a_file_are_whole_and_without_tokens(tmp_path: Path) -> None:
    path = stubs.write_comparisons(tmp_path / "set.jsonl", num_pairs=1)
    ((row,), _) = read_comparisons(str(path), seed=0)
    assert isinstance(row.first, Response) and row.first.finish_reason == "eos"
    assert row.first.token_ids == () and row.first.id != row.second.id
