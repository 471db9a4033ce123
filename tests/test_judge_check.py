"""A campaign watches its judge: figures of every round, a gold set, empty words, and alarms."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, JudgeServer, Request, Say
from test_bad_input import cli, run_config
from test_campaign import run_and_die, run_it
from test_endings import obey, printed
from tiny import digests, in_child, tiny_config
from unsound_judges import CONSTANT, quality

from online_dpo.alarms import judge_alarms, latest
from online_dpo.config import AlarmsConfig
from online_dpo.config_file import config_from_dict
from online_dpo.display.judge_table import spending_table
from online_dpo.files import read_json
from online_dpo.judge_figures import Judged, figures
from online_dpo.judge_health import Shown, label_figures
from online_dpo.report.build import render
from online_dpo.stages.judge_questions import chosen_gold
from online_dpo.store import RunDir, read_lines
from online_dpo.tables import read_table
from online_dpo.views import Campaign

JUDGES = Path(__file__).parent / "unsound_judges.py"


def config_of(run: Path, policy: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """One round from a policy 0 that is there, judged by a class or function of JUDGES."""
    options = {"name": f"{JUDGES}:{name}", **sections.pop("judge", {})}
    sections = {"campaign": {"rounds": 1}, **sections}
    config = tiny_config(run, **sections)
    config |= {"judge": options, "model": {"path": str(policy)}}
    del config["sft"]
    return config


def write_gold(path: Path, count: int, *, wrong: int) -> Path:
    """Comparisons labelled by quality, except for the first `wrong` of them."""
    rows = []
    for i in range(count):
        first, second = f"answer {i}", f"another answer {i}"
        better = (quality(first) > quality(second)) != (i < wrong)
        label = "first" if better else "second"
        rows.append({"prompt": f"Ask {i}", "first": first, "second": second, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of a sound judge, with a gold set of which it gets 24 of 30 right."""
    folder = tmp_path_factory.mktemp("sound")
    assert in_child(run_it, sound_config(folder)) == 0
    return folder / "run"


def sound_config(folder: Path) -> dict[str, Any]:
    judge = {"gold": str(write_gold(folder / "gold.jsonl", 30, wrong=6)), "gold_pairs": 30}
    return tiny_config(folder / "run", judge={"name": f"{JUDGES}:Sound", "options": {}, **judge})


@pytest.fixture(scope="module")
def policy(sound: Path) -> Path:
    return sound / "rounds/000/policy"


def test_a_sound_judge_raises_no_alarm_and_is_measured_in_every_round(sound: Path) -> None:
    views = Campaign(sound).rounds()
    assert [view.alarms for view in views] == [[], [], []]
    assert views[0].judge is None
    for view in views[1:]:
        assert view.judge is not None
        assert view.judge["gold"]["accuracy"]["value"] == pytest.approx(0.8)
        assert view.judge["gold"]["labelled"] == 30
        assert view.judge["constant"] == {
            "value": 0.0,
            "low": 0.0,
            "high": 0.10718,
            "count": 32,
        } | {"high": pytest.approx(0.107, abs=1e-3)}
        assert view.judge["labels"]["agreement"]["value"] == 1.0
        assert view.judge["labels"]["order_conflicts"] == 0.0
    assert "judge_check" in {info.name for info in RunDir(sound).round(2).artifacts()}
    rows = read_lines(sound / "metrics.jsonl")
    assert [r["round"] for r in rows if r["stage"] == "judge_check"] == [1, 2]
    assert not [e for e in RunDir(sound).events() if e["event"] == "alarm"]


def test_the_figures_are_those_of_all_of_the_rounds_pairs(sound: Path) -> None:
    """Over both shards together, the lengths in tokens."""
    round_dir = RunDir(sound).round(1)
    tokens = {
        row["id"]: len(row["token_ids"])
        for name in round_dir.children("samples")
        for row in read_table(round_dir.path / name / "samples.parquet")
    }
    labels = [
        row
        for name in round_dir.children("labels")
        for row in read_table(round_dir.path / name / "labels.parquet")
    ]
    assert len(round_dir.children("labels")) == 2 and len(labels) == 8 * 6
    expected = figures(
        [
            Judged(
                tuple(r["order_ps"]), r["p"], r["reason"], tokens[r["first_id"]],
                tokens[r["second_id"]], prompt_id=r["prompt_id"], first_id=r["first_id"],
                second_id=r["second_id"],
            )
            for r in labels
        ]
    )  # fmt: skip
    found = read_json(round_dir.path / "judge_check/metrics.json")
    assert found["labels"] == expected and found["labels"]["prefers_longer"]["count"] > 20
    assert found["verdicts"] == 48 - expected["identical"]


def test_what_was_asked_can_be_read(sound: Path) -> None:
    rows = read_table(sound / "rounds/001/judge_check/checks.parquet")
    gold = [row for row in rows if row["part"] == "gold"]
    probes = [row for row in rows if row["part"] == "constant"]
    assert len(gold) == 30 and {row["gold"] for row in gold} == {0.0, 1.0}
    assert len(probes) == 32 and {row["first_text"] for row in probes} == {CONSTANT}
    assert len({row["prompt_id"] for row in probes}) == 8
    assert len({row["second_id"] for row in probes}) == 32
    again = read_table(sound / "rounds/002/judge_check/checks.parquet")
    assert [r["first_id"] for r in again if r["part"] == "gold"] == [r["first_id"] for r in gold]


def test_a_kill_changes_no_figure(sound: Path, tmp_path: Path) -> None:
    config = sound_config(tmp_path)
    assert in_child(run_and_die, config, "001/judge_check", False) == -signal.SIGKILL
    assert in_child(run_it, config) == 0
    assert digests(tmp_path / "run") == digests(sound)


FAULTS = [
    ("Longer", {}, "prefers_longer", "won by the longer response"),
    ("long_words", {}, "prefers_longer", "won by the longer response"),
    ("First", {"swap": "soft"}, "order_conflicts", "by position more than by content"),
    ("First", {"swap": "agree"}, "order_conflicts", "by position more than by content"),
    ("Unreadable", {}, "invalid", "most of them for “no verdict in the reply”"),
    ("EmptyWords", {}, "constant_wins", "100% of 32 comparisons"),
    ("empty_words", {}, "constant_wins", "100% of 32 comparisons"),
]


@pytest.mark.parametrize(("judge", "settings", "name", "said"), FAULTS)
def test_a_fault_stops_the_campaign_before_it_trains(
    policy: Path, tmp_path: Path, judge: str, settings: dict[str, Any], name: str, said: str
) -> None:
    alarms = {"actions": {name: "stop"}}
    config = config_of(tmp_path / "run", policy, judge, judge=settings, alarms=alarms)
    code, output = run_config(tmp_path, config)
    assert code == 12, output
    assert "Round 1: " in printed(output, "error") and said in printed(output, "error")
    safe = "round 0; of round 1: samples (2 parts), labels (2 parts), judge_check."
    assert printed(output, "safe") == safe
    remedy = printed(output, "to go on")
    assert remedy.endswith(f" --set alarms.actions.{name}=warn")
    assert f"online-dpo resume {tmp_path / 'run'}" in remedy
    view = Campaign(tmp_path / "run").rounds()[-1]
    assert view.stage == "pair"
    # What is longer than all responses wins by its length too.
    others = [] if name != "prefers_longer" else ["constant_wins"]
    assert [alarm.name for alarm in view.alarms] == [name, *others]
    (event, *_) = [e for e in RunDir(tmp_path / "run").events() if e["event"] == "alarm"]
    assert (event["alarm"], event["action"], event["round"]) == (name, "stop", 1)


def test_a_warning_is_everywhere_and_a_stop_is_taken_back(policy: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    alarms = {"actions": {"prefers_longer": "stop"}}
    config = config_of(run, policy, "Longer", alarms=alarms, evaluation={"max_prompts": 2})
    code, output = run_config(tmp_path, config)
    assert code == 12, output
    labels = run / "rounds/001/labels/part-00000/labels.parquet"
    before = labels.stat().st_mtime_ns
    assert obey(printed(output, "to go on"), log) == 0, log.read_text()
    assert labels.stat().st_mtime_ns == before and RunDir(run).round(1).finished
    alarm, _ = Campaign(run).rounds()[1].alarms
    assert alarm.action == "warn" and alarm.sentence in log.read_text()
    assert in_child(cli, ["status", str(run)], str(log)) == 0
    shown = " ".join(log.read_text().split())
    assert f"Alarm: {alarm.sentence}" in shown and "longer: decided pairs won" in shown
    assert in_child(cli, ["status", "--json", str(run)], str(log)) == 0
    told, _ = json.loads(log.read_text())["rounds"][1]["alarms"]
    assert told["name"] == "prefers_longer" and told["sentence"] == alarm.sentence
    page = render(Campaign(run))
    assert '<section id="alarms">' in page and alarm.sentence in page
    assert '<section id="judge">' in page and "<title>What wins</title>" in page


def test_gold_is_bought_once(policy: Path, tmp_path: Path) -> None:
    """A judge behind an API answers later rounds, and a resumed one, from the ledger."""
    gold = write_gold(tmp_path / "gold.jsonl", 5, wrong=0)
    with JudgeServer(says) as server:
        model = {"model": "m", "base_url": server.url, "price_per_million": [1.0, 2.0]}
        judge = {"name": "llm_pairwise", "options": model, "comparisons": 1, "probes": 2}
        judge |= {"orders": "one", "gold": str(gold), "gold_pairs": 4}
        own = {"judge": {"name": f"{JUDGES}:long_words"}, "max_prompts": 2}
        rounds = {"rounds": 2}
        config = config_of(
            tmp_path / "run", policy, "", judge=judge, evaluation=own, campaign=rounds
        )
        killed = in_child(run_and_die, config, "001/judge_check", False)
        assert killed == -signal.SIGKILL
        assert len(asked(server, "Ask ")) == 4
        assert in_child(run_it, config) == 0
        assert len(asked(server, "Ask ")) == 4
        # Two rounds of two probes; a kill buys none of them again.
        assert len(asked(server, "hope this helps")) == 4
    with sqlite3.connect(tmp_path / "run/judgments.sqlite") as db:
        counts = db.execute("SELECT purpose, count(*) FROM judgments GROUP BY purpose").fetchall()
    bought = {"gold": 4, "constant-001": 2, "constant-002": 2}
    assert bought.items() <= dict(counts).items()
    views = Campaign(tmp_path / "run").rounds()
    spent = [view.spent for view in views]
    # At 100 tokens in for $1 a million and 10 out for $2: 8 pairs labelled, 2 probes a round.
    assert [s and (s.calls, s.tokens, s.usd) for s in spent] == [
        (4, 440, pytest.approx(4 * 120e-6)),
        *[(10, 1100, pytest.approx(10 * 120e-6))] * 2,
    ]
    assert all(s and s.mean_s and s.mean_s > 0 for s in spent)
    titles, rows = spending_table(views) or ([], [])
    assert titles == ["round", "calls", "tokens", "cost", "a call"]
    assert [row[:4] for row in rows][-1] == ["all", "24", "2,640", "$0.0029"]
    page = render(Campaign(tmp_path / "run"))
    assert '<section id="spending">' in page and "$0.0029" in page
    checks = [view.judge for view in views[1:]]
    assert [check and check["gold"] for check in checks] == [checks[0] and checks[0]["gold"]] * 2


def says(request: Request, number: int) -> Answer:
    """Always the response that is shown first."""
    return Say('{"verdict": "A"}')


def asked(server: JudgeServer, words: str) -> list[Request]:
    return [request for request in server.requests if words in json.dumps(request)]


@pytest.mark.parametrize(
    ("gold", "said"), [("no.jsonl", "'no.jsonl' does not exist"), ("bad.jsonl", "no labelled comp")]
)
def test_a_gold_set_that_is_none_ends_a_start(tmp_path: Path, gold: str, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "first": "a", "second": "b"}\n')
    config = tiny_config(tmp_path / "run")
    config["judge"] |= {"gold": gold}
    code, output = run_config(tmp_path, config)
    assert code == 2 and said in printed(output, "error"), output
    assert not (tmp_path / "run").exists()


def test_a_shipped_set_is_gold_of_which_a_seed_draws_a_part(tmp_path: Path) -> None:
    def drawn(**campaign: int) -> list[str]:
        config = tiny_config(tmp_path / "run", campaign=campaign)
        config["judge"] |= {"gold": "judge_check.jsonl", "gold_pairs": 10}
        return [row.prompt.id for row in chosen_gold(config_from_dict(config).config)]

    assert len(drawn()) == 10 and drawn() == drawn()
    assert drawn() != drawn(seed=1)


# --- figures and alarms by hand


def score_row(id: str, score: float | None, reason: str | None = None) -> dict[str, Any]:
    row = {
        "prompt_id": "p",
        "first_id": id,
        "second_id": None,
        "p": None,
        "order_ps": [],
        "vote_ps": [],
    }
    return row | {"score": score, "reason": reason}


def test_figures_of_scores_by_hand() -> None:
    """Scores have no orders; a share without a score is one of the scores, not of their pairs."""
    rows = [
        score_row("a", 3.0), score_row("b", 1.0), score_row("c", 1.0), score_row("d", 1.0),
        score_row("e", None, "no score in the reply"), score_row("f", None, "my own reason"),
    ]  # fmt: skip
    texts = {"a": ("one", 9), "b": ("two", 4), "c": ("three", 12), "d": ("three", 12)}
    samples = {i: Shown(text, "eos", n) for i, (text, n) in texts.items()}
    found = label_figures(rows, samples, kind="score", scale=1.0, is_swapped=lambda row: None)
    assert (found["verdicts"], found["unusable"]) == (6, {"no score in the reply": 1})
    labels = found["labels"]
    assert (labels["pairs"], labels["identical"]) == (6, 1)
    assert labels["invalid"] == labels["abstained"] == pytest.approx(1 / 6)
    assert labels["ties"] == pytest.approx(2 / 5)
    # a beats b, which is shorter, and the longer c and d.
    assert labels["prefers_longer"]["value"] == pytest.approx(1 / 3)
    assert labels["prefers_longer"]["count"] == 3
    for absent in ("agreement", "order_conflicts", "prefers_first", "accuracy", "intransitive"):
        assert labels[absent] is None


def test_votes_that_differ_are_unstable() -> None:
    """Of two orders of three votes one is of one mind, in the other 1 of 3 pairs of votes is."""
    row = {
        "prompt_id": "p", "first_id": "a", "second_id": "b", "score": None, "p": 0.8,
        "reason": None, "orders": 2, "order_ps": [0.9, 0.7],
        "vote_ps": [0.9, 0.9, 0.9, 0.8, 0.6, None],
    }  # fmt: skip
    samples = {"a": Shown("one", "eos", 1), "b": Shown("two", "eos", 2)}
    found = label_figures([row], samples, kind="compare", scale=1.0, is_swapped=lambda row: None)
    stability = found["labels"]["repeat_stability"]
    assert stability == {"value": pytest.approx((1 + 1 / 3) / 2), "count": 2}
    assert found["labels"]["agreement"]["value"] == 1.0


def check_of(**labels: Any) -> dict[str, Any]:
    rates = ("order_conflicts", "agreement", "invalid", "prefers_longer")
    found = {**dict.fromkeys(rates), **labels}
    return {"verdicts": 100, "unusable": {"x": 1, "y": 5}, "labels": found, "constant": None}


def rate(value: float, count: int) -> dict[str, Any]:
    return {"value": value, "low": 0.0, "high": 1.0, "count": count}


def raised(check: dict[str, Any], **settings: Any) -> list[str]:
    return [a.name for a in judge_alarms(check, AlarmsConfig(**settings), round=3)]


def test_thresholds_are_the_shares_that_are_still_borne() -> None:
    assert raised(check_of()) == []
    assert raised(check_of(order_conflicts=0.4, agreement=rate(0.6, 50))) == []
    assert raised(check_of(order_conflicts=0.41, agreement=rate(0.5, 50))) == ["order_conflicts"]
    assert raised(check_of(invalid=0.05)) == []
    assert raised(check_of(invalid=0.06)) == ["invalid"]
    assert raised(check_of(prefers_longer=rate(0.7, 50))) == []
    assert raised(check_of(prefers_longer=rate(0.72, 50))) == ["prefers_longer"]
    assert raised(check_of() | {"constant": rate(0.5, 32)}) == []
    assert raised(check_of() | {"constant": rate(0.53, 32)}) == ["constant_wins"]


def test_few_observations_are_no_ground_for_an_alarm() -> None:
    longer = check_of(prefers_longer=rate(0.9, 19))
    assert raised(longer) == []
    assert raised(longer, min_count=19) == ["prefers_longer"]
    assert raised(longer, min_count=19, prefers_longer=1.0) == []


def test_a_sentence_has_its_figures_and_is_told_once() -> None:
    alarms = [
        *judge_alarms(check_of(invalid=0.0625), AlarmsConfig(), round=2),
        *judge_alarms(check_of(invalid=0.12), AlarmsConfig(), round=5),
    ]
    assert alarms[0].sentence.startswith(
        "Round 2: 6.25% of 100 verdicts could not be read, most of them for “y” "
        "(alarms.invalid: 5%); "
    )
    (told,) = latest(alarms)
    assert told == f"{alarms[1].sentence} So it was in round 2."
    assert latest([*alarms, alarms[1]])[0].endswith("So it was in rounds 2 and 5.")
