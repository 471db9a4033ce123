"""Which changes of a config a run takes, and which it refuses, with the way out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from run_fixture import make_run

from online_dpo.drift import check_changes
from online_dpo.errors import DriftError
from online_dpo.store import RunDir


@pytest.fixture
def stopped(tmp_path: Path) -> RunDir:
    """Round 3 has its pairs and no policy yet."""
    run = RunDir(make_run(tmp_path / "run", rounds=3, finished=2))
    third = run.round(3)
    if not third.has("pairs"):
        for name in ("labels/part-00000", "judge_check", "pairs"):
            with third.commit(name, inputs={}) as draft:
                (draft.path / "x").write_text("x")
    return run


def check(run: RunDir, key: str, new: Any = 2, *, accept: bool = True) -> None:
    check_changes(run, {key: (1, new)}, accept)


def test_operational_settings_change_freely(stopped: RunDir) -> None:
    check(stopped, "judge.budget.max_usd", accept=False)
    check(stopped, "campaign.rounds", 5, accept=False)
    check(stopped, "evaluation.examples", accept=False)
    check(stopped, "alarms.actions.invalid", "stop", accept=False)
    check(stopped, "sampling.endpoints.0.url", accept=False)


def test_a_campaign_does_not_become_shorter_than_it_is(stopped: RunDir) -> None:
    with pytest.raises(DriftError, match="campaign.rounds: 2 is fewer than the 3"):
        check(stopped, "campaign.rounds", 2)


def test_how_things_are_computed_changes_within_a_round_when_accepted(stopped: RunDir) -> None:
    """Memory has run out half-way: the samples and labels that are there are not given up."""
    for key in (
        "train.micro_batch_tokens",
        "train.gradient_checkpointing",
        "sampling.engine.seed",
        "judge.gold",
    ):
        with pytest.raises(DriftError, match="still to be done"):
            check(stopped, key, accept=False)
        check(stopped, key)


def test_evaluations_stay_comparable_with_policy_0s(stopped: RunDir) -> None:
    with pytest.raises(DriftError, match="cannot change"):
        check(stopped, "sampling.max_new_tokens")
    with pytest.raises(DriftError, match="cannot change"):
        check(stopped, "sampling.stop")


@pytest.mark.parametrize("key", ["model.path", "prompts.holdout", "sft.epochs", "campaign.seed"])
def test_what_round_0_rests_on_never_changes(stopped: RunDir, key: str) -> None:
    with pytest.raises(DriftError, match="cannot change"):
        check(stopped, key)


@pytest.mark.parametrize(
    ("key", "given_up"),
    [
        ("pairs.min_margin", ["pairs"]),
        ("judge.name", ["labels", "judge_check", "pairs"]),
        ("train.beta", ["round.json"]),
        ("reference.promote", ["round.json"]),
        ("sampling.n", [""]),
        ("campaign.prompts_per_round", [""]),
    ],
)
def test_what_a_begun_round_has_used_does_not_change(
    stopped: RunDir, key: str, given_up: list[str]
) -> None:
    """The way out gives up what the setting had a part in, and nothing that was paid before it."""
    with pytest.raises(DriftError, match="Round 3 has come past") as caught:
        check(stopped, key)
    redo, _, again = (caught.value.remedy or "").partition("; ")
    assert shlex.split(redo) == ["rm", "-r", *(str(stopped.round(3).path / n) for n in given_up)]
    assert again == f"online-dpo resume {stopped.path} --accept-change --set {key}=2"


def test_processes_change_inside_a_round_when_accepted(stopped: RunDir) -> None:
    with stopped.round(3).commit("reference", inputs={}) as draft:
        (draft.path / "x").write_text("x")
    with pytest.raises(DriftError, match="come past"):
        check(stopped, "train.epochs")
    for key in ("train.num_processes", "train.parallel", "train.launch.num_machines"):
        check(stopped, key)
        with pytest.raises(DriftError, match="This changes"):
            check(stopped, key, accept=False)
    check(stopped, "train.launch.main_process_ip", accept=False)


def test_what_it_has_not_used_yet_changes_when_accepted(stopped: RunDir) -> None:
    check(stopped, "train.micro_batch_tokens")
    check(stopped, "evaluation.examples")
    with pytest.raises(DriftError) as caught:
        check(stopped, "train.micro_batch_tokens", accept=False)
    command: list[Any] = shlex.split(caught.value.remedy or "")
    assert command[:2] == ["online-dpo", "resume"]
    assert command[-3:] == ["--accept-change", "--set", "train.micro_batch_tokens=2"]
