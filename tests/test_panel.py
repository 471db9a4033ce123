"""Panels: rules against hand numbers, members of every kind and mode, failures, what is kept."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import pair
from judge_server import BAD_KEY, JudgeServer, Say

from judges.panel import Panel, members_said
from online_dpo.asking.unusable_replies import is_unusable
from online_dpo.config import JudgeConfig
from online_dpo.config_file import config_from_dict
from online_dpo.errors import BudgetError, ConfigError, JudgeError
from online_dpo.judging import Labeller
from online_dpo.preflight import check_config
from online_dpo.records import Comparison
from online_dpo.trust import code_fields
from online_dpo.voting import combine_votes

CASES = Path(__file__).parent / "judge_cases.py"
FIRST = {"name": "scripted", "label": "first", "options": {"verdicts": [], "default": 1.0}}
SECOND = {"name": "scripted", "label": "second", "options": {"verdicts": [], "default": 0.0}}
UNSURE = {"name": "scripted", "label": "unsure", "options": {"verdicts": [], "default": 0.6}}
ABSTAINS = {"name": f"{CASES}:Abstains", "label": "abstains"}
UNREADABLE = {"name": f"{CASES}:Unreadable", "label": "unreadable"}
FAILS = {"name": f"{CASES}:Fails", "label": "fails"}
LENGTH = {"name": f"{CASES}:length", "label": "length"}
LEXICON = {
    "name": "heuristic",
    "options": {"scorers": [{"kind": "lexicon", "positive": ["good"], "negative": ["poor"]}]},
}

MODEL = {
    "name": "llm_pairwise",
    "options": {"model": "m", "base_url": "http://localhost:1/v1"},
}

WAYS = (("good", "poor"), ("poor", "good"))

MakeLabeller = Callable[..., Labeller]


@pytest.fixture
def make(open_labeller: MakeLabeller) -> MakeLabeller:
    """Makes labellers for panels of the given members."""

    def make_labeller(
        *members: dict[str, Any], vote: str = "majority", quorum: int | None = None, **config: Any
    ) -> Labeller:
        options = {"members": list(members), "vote": vote, "quorum": quorum}
        return open_labeller(seed=7, name="panel", options=options, **{"orders": "one", **config})

    return make_labeller


def ask(labeller: Labeller, number: int = 0, **metadata: Any) -> Comparison:
    (comparison,) = labeller.compare_pairs([pair(number, **metadata)], purpose="label")
    return comparison


# --- rules


@pytest.mark.parametrize(
    ("votes", "rule", "weights", "p"),
    [
        ([1.0, 0.7, 0.2], "majority", None, 1.0),
        ([1.0, 0.2], "majority", None, 0.5),
        ([1.0, 0.5, 0.5], "majority", None, 0.5),
        ([1.0, 0.2, 0.1], "majority", [3, 1, 1], 1.0),
        ([1.0, 0.2, 0.1], "majority", [2, 1, 1], 0.5),
        ([1.0, 0.7, 0.1], "mean", None, 0.6),
        ([1.0, 0.0], "mean", [3, 1], 0.75),
        ([1.0, 0.6], "unanimous", None, 1.0),
        ([0.4, 0.0, 0.1], "unanimous", None, 0.0),
        ([1.0, 0.6, 0.5], "unanimous", None, 0.5),
        ([0.3], "mean", None, 0.3),
    ],
)
def test_votes_become_one_p(votes: list[float], rule: Any, weights: Any, p: float) -> None:
    assert combine_votes(votes, rule, weights=weights) == pytest.approx(p)


# Eighths are exact, and so is 1 - p; weights are small whole numbers.
BALLOTS = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5)), min_size=1, max_size=6)
RULES = st.sampled_from(["majority", "mean", "unanimous"])


@given(BALLOTS, RULES, st.randoms())
def test_rules_are_free_of_order_and_turn_with_the_votes(ballots: Any, rule: Any, rng: Any) -> None:
    votes, weights = [n / 8 for n, _ in ballots], [float(w) for _, w in ballots]
    p = combine_votes(votes, rule, weights=weights)
    assert 0 <= p <= 1
    shuffled = rng.sample(range(len(votes)), len(votes))
    assert p == combine_votes(
        [votes[i] for i in shuffled], rule, weights=[weights[i] for i in shuffled]
    )
    turned = combine_votes([1 - vote for vote in votes], rule, weights=weights)
    assert turned == pytest.approx(1 - p, abs=1e-15)
    assert (turned == 0.5) == (p == 0.5)


# --- members of every kind


def test_scorers_and_comparers_vote_together_and_each_word_is_kept(make: MakeLabeller) -> None:
    labeller = make(SECOND, LEXICON, LENGTH, vote="mean", orders="both")
    assert labeller.kind == "compare"
    comparison = ask(labeller, first="good", second="poorer")
    shown, swapped = map(members_said, comparison.raws)
    # sigmoid(1) for a good word, sigmoid(-2) for two characters less.
    by_words, by_length = 0.7310585786300049, 0.11920292202211755
    assert shown == {
        "heuristic": {"p": pytest.approx(by_words), "raw": "1 and 0"},
        "length": {"p": pytest.approx(by_length), "raw": "6 and 8"},
        "second": {"p": 0.0},
    }
    assert swapped["length"] == {"p": pytest.approx(1 - by_length), "raw": "8 and 6"}
    assert comparison.p == pytest.approx((by_words + by_length + 0.5) / 3)
    assert labeller.identity["version"] == (
        f"1; heuristic: heuristic 1; length: {CASES}:length 0; second: scripted 1"
    )


def test_the_order_of_the_members_does_not_matter(make: MakeLabeller) -> None:
    texts = [(f"{one} {n}", f"{other} {n}") for n in range(4) for one, other in WAYS]
    rng = random.Random(0)
    members = [
        {
            "name": "scripted",
            "label": f"member {n}",
            "weight": 2 + n,  # no two are a tie against the third
            "options": {
                "verdicts": [{"first": a, "second": b, "p": rng.random()} for a, b in texts]
            },
        }
        for n in range(3)
    ]
    for vote in ("majority", "mean"):
        labellers = [make(*order, vote=vote) for order in (members, members[::-1])]
        assert len({labeller.identity["version"] for labeller in labellers}) == 1
        for number in range(4):
            assert len({ask(labeller, number) for labeller in labellers}) == 1
            assert ask(labellers[0], number).p not in (None, 0.5)


def test_swapping_the_pair_turns_the_panels_p(make: MakeLabeller) -> None:
    labeller = make(LEXICON, LENGTH, UNSURE, vote="mean", orders="both")
    prompt, one, other = pair(first="good", second="very poor")
    there, back = labeller.compare_pairs(
        [(prompt, one, other), (prompt, other, one)], purpose="label"
    )
    assert there.p is not None and back.p == pytest.approx(1 - there.p, abs=1e-12)


def test_a_scorer_in_a_process_scores_each_response_once(
    make: MakeLabeller, tmp_path: Path
) -> None:
    log = tmp_path / "asked"
    counted = {"name": f"{CASES}:Counted", "options": {"log": str(log)}}
    labeller = make(counted, LEXICON, orders="both")
    prompt, one, other = pair()
    third = pair(1)[1]
    pairs = [(prompt, one, other), (prompt, one, third), (prompt, other, third)]
    labeller.compare_pairs(pairs, purpose="label")
    assert sorted(log.read_text().split()) == sorted([one.id, other.id, third.id])


# --- abstentions, failures, quorum


def test_an_abstaining_member_counts_against_the_quorum_only(make: MakeLabeller) -> None:
    strict = ask(make(FIRST, ABSTAINS))
    assert strict.p is None
    assert strict.reason == "1 of 2 members gave a verdict, fewer than the quorum of 2"
    said = members_said(strict.raws[0])
    assert said["abstains"] == {"p": None, "reason": "it depends", "raw": "who knows"}
    assert said["first"] == {"p": 1.0}
    assert ask(make(FIRST, ABSTAINS, quorum=1)).p in (0.0, 1.0)


def test_replies_that_could_not_be_used_are_no_abstention(make: MakeLabeller) -> None:
    """So that the figure `invalid`, and its alarm, see them through a panel."""
    unread = ask(make(FIRST, UNREADABLE)).reason
    assert unread == (
        "no verdict in the reply: 1 of 2 members gave a verdict, fewer than the quorum of 2"
    )
    assert is_unusable(unread)
    # Had it been read, the one that abstains would still leave too few.
    assert not is_unusable(ask(make(FIRST, ABSTAINS, UNREADABLE)).reason)
    assert ask(make(FIRST, UNREADABLE, quorum=1)).p in (0.0, 1.0)


def test_a_failing_member_does_not_sink_the_panel_above_its_quorum(make: MakeLabeller) -> None:
    events: list[Any] = []
    labeller = make(FIRST, UNSURE, FAILS, quorum=2, events=events)
    for number in range(3):
        comparison = ask(labeller, number, fails=True)
        said = members_said(comparison.raws[0])
        assert comparison.p in (0.0, 1.0)
        assert said["fails"]["p"] is None and "the disk is gone" in said["fails"]["reason"]
    told = [event for event in events if event["event"] == "judge_member_failed"]
    assert [event["member"] for event in told] == ["fails"]


def test_below_its_quorum_a_failing_member_ends_labelling(make: MakeLabeller) -> None:
    with pytest.raises(JudgeError, match="the disk is gone"):
        ask(make(FIRST, UNSURE, FAILS), fails=True)
    # Were it sound, there would still be too few: no verdict, and no failure either.
    assert ask(make(ABSTAINS, FAILS, quorum=2), fails=True).p is None


def test_a_member_that_hangs_is_left_out_after_its_deadline(make: MakeLabeller) -> None:
    hangs = {"name": f"{CASES}:AsyncHangs", "label": "hangs"}
    comparison = ask(make(FIRST, UNSURE, hangs, quorum=2, timeout_s=0.2))
    assert "did not answer within 0.2 s" in members_said(comparison.raws[0])["hangs"]["reason"]
    assert comparison.p in (0.0, 1.0)


# --- paid members


def grader(server: JudgeServer, **member: Any) -> dict[str, Any]:
    options = {"base_url": server.url, **member.pop("options", {})}
    return {"name": f"{CASES}:Paying", "label": "grader", "options": options, **member}


def ledger(tmp_path: Path, columns: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(tmp_path / "judgments.sqlite") as connection:
        rows = connection.execute(f"SELECT {columns} FROM calls").fetchall()
    connection.close()
    return rows


def test_a_paid_member_has_its_own_name_in_the_ledger_and_is_paid_once_a_response(
    make: MakeLabeller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    with JudgeServer(lambda request, number: Say("7")) as server:
        prompt, one, other = pair()
        third = pair(1)[1]
        pairs = [(prompt, one, other), (prompt, one, third), (prompt, other, third)]
        for _ in range(2):
            labeller = make(grader(server), FIRST, orders="both", vote="mean")
            comparisons = labeller.compare_pairs(pairs, purpose="label")
            assert [c.p for c in comparisons] == [0.5] * 3  # 0.5, and always the first
            labeller.close()
    assert server.num_billed == 3
    rows = ledger(tmp_path, "judge, version, response_ids")
    assert {row[:2] for row in rows} == {(f"{CASES}:Paying", "1")}
    assert sorted(json.loads(row[2]) for row in rows) == sorted([[one.id], [other.id], [third.id]])


def test_what_a_judge_said_alone_is_not_bought_again_for_a_panel(
    make: MakeLabeller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    with JudgeServer(lambda request, number: Say("[[A]]")) as server:
        judge = {
            "name": "llm_pairwise",
            "options": {"model": "m", "base_url": server.url, "structured": False},
        }
        alone = Labeller(
            JudgeConfig(**judge),
            base=None,
            ledger_path=tmp_path / "judgments.sqlite",
            seed=7,
            round=1,
            on_event=lambda event: None,
        )
        ask(alone)
        alone.close()
        assert server.num_billed == 2
        ask(make({**judge, "label": "paid"}, FIRST, orders="both"))
    assert server.num_billed == 2


def test_a_paid_member_whose_key_is_refused_fails_alone(
    make: MakeLabeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    with JudgeServer(lambda request, number: BAD_KEY) as server:
        strict = {
            "name": "llm_pairwise",
            "options": {"model": "m", "base_url": server.url, "structured": False},
        }
        comparison = ask(make(strict, FIRST, UNSURE, quorum=2))
        assert "bad key" in members_said(comparison.raws[0])["llm_pairwise"]["reason"]
        assert comparison.p in (0.0, 1.0)
        with pytest.raises(JudgeError, match="bad key"):
            ask(make(strict, FIRST, UNSURE), 1)


def test_no_quorum_outvotes_the_budget(make: MakeLabeller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    with JudgeServer(lambda request, number: Say("7")) as server:
        labeller = make(grader(server), FIRST, UNSURE, quorum=1, budget={"max_usd": 1e-9})
        with pytest.raises(BudgetError):
            ask(labeller)
        with pytest.raises(ConfigError, match="max_usd cannot be kept without a price"):
            make(grader(server, options={"dollars": None}), FIRST, budget={"max_usd": 1.0})


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": [FIRST]}, "at least two members"),
        ({"members": [FIRST, FIRST]}, r"members\[0\]: two members are called 'first'"),
        ({"members": [FIRST, {"name": "panel"}]}, r"members\[1\]: a panel cannot be a member"),
        ({"members": [FIRST, {"label": "x"}]}, r"members\[1\]\.name: Field required"),
        ({"members": [FIRST, {**SECOND, "wieght": 2}]}, r"members\[1\]\.wieght: Extra inputs"),
        ({"members": [FIRST, {**SECOND, "weight": 0}]}, r"members\[1\]\.weight: .*greater than 0"),
        ({"members": [FIRST, SECOND], "vote": "veto"}, "majority, mean, unanimous, not 'veto'"),
        ({"members": [FIRST, SECOND], "quorum": 3}, "quorum: 3 of 2 members cannot be"),
        (
            {"members": [FIRST, {**SECOND, "weight": 2}], "vote": "unanimous"},
            r"members\[1\]\.weight: where the vote must be unanimous",
        ),
    ],
)
def test_what_is_no_panel_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Panel(**options)


def config(tmp_path: Path, *members: dict[str, Any], **judge: Any) -> Any:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    return config_from_dict(
        {
            "model": {"path": str(tmp_path)},
            "prompts": {"train": [{"path": str(tmp_path / "prompts.jsonl")}], "holdout": 1},
            "judge": {"name": "panel", "options": {"members": list(members)}, **judge},
            "campaign": {"run_dir": str(tmp_path / "run")},
        }
    ).config


@pytest.mark.parametrize(
    ("members", "judge", "message"),
    [
        (
            [FIRST, {**SECOND, "scale": 2}],
            {},
            r"judge\.options\.members\[1\]\.scale makes p of two scores; 'scripted' compares",
        ),
        ([FIRST, {"name": "heuristc"}], {}, "no judge named 'heuristc'"),
        ([FIRST, SECOND], {"budget": {"max_usd": 5}}, "judge.budget"),
        ([FIRST, SECOND], {"concurrency": 5}, "judge.concurrency is for judges that call an API"),
        ([FIRST, MODEL], {"votes": 3}, r"judge\.votes: 3 would buy the same answer so often"),
    ],
)
def test_validate_tries_every_member(
    tmp_path: Path, members: list[Any], judge: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config(tmp_path, *members, **judge))


def test_votes_are_for_panels_that_may_say_something_else(
    tmp_path: Path, make: MakeLabeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    warm = {"label": "warm", **MODEL, "options": {**MODEL["options"], "temperature": 0.7}}
    assert make(MODEL, warm, votes=2).kind == "compare"
    assert not check_config(config(tmp_path, MODEL, warm, votes=2)).here
    with pytest.raises(ConfigError, match=r"members\[\.\.\.\]\.options\.temperature, e\.g\. 0\.7"):
        make(FIRST, MODEL, votes=2)


def test_a_clash_of_a_member_is_refused_at_the_start_too(make: MakeLabeller) -> None:
    with pytest.raises(ConfigError, match=r"members\[1\]\.scale makes p of two scores"):
        make(FIRST, {**SECOND, "scale": 2})


def test_members_that_are_code_must_be_trusted(tmp_path: Path) -> None:
    loaded = config(tmp_path, FIRST, LENGTH)
    assert list(code_fields(loaded)) == [("judge.options.members[1].name", LENGTH["name"])]


def test_a_members_file_is_found_from_the_configs_folder(tmp_path: Path) -> None:
    from online_dpo.config_file import load_config

    (tmp_path / "mine.py").write_text("def judge(prompt, response):\n    return 1.0\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "c.yaml").write_text(
        "model: {path: gpt2}\nprompts: {train: [{path: prompts.jsonl}], holdout: 1}\n"
        "judge: {name: panel, options: {members: [{name: 'mine.py:judge'}, {name: heuristic}]}}\n"
    )
    members = load_config(tmp_path / "c.yaml").config.judge.options["members"]
    assert members[0]["name"] == f"{tmp_path / 'mine.py'}:judge"
