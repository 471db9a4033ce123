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
        for name in ("labels/part-00000", "pairs"):
            with third.commit(name, inputs={}) as draft:
                (draft.path / "x").write_text("x")
    return run


def check(run: RunDir, key: str, *, accept: bool = True) -> None:
    check_changes(run, {key: (1, 2)}, accept)


def test_operational_settings_change_freely(stopped: RunDir) -> None:
    check(stopped, "judge.budget", accept=False)
    check(stopped, "campaign.rounds", accept=False)


@pytest.mark.parametrize("key", ["model.path", "prompts.holdout", "sft.epochs", "campaign.seed"])
def test_what_round_0_rests_on_never_changes(stopped: RunDir, key: str) -> None:
    with pytest.raises(DriftError, match="cannot change"):
        check(stopped, key)


@pytest.mark.parametrize(
    "key", ["pairs.min_margin", "judge.name", "train.beta", "reference.promote"]
)
def test_what_a_begun_round_has_used_does_not_change(stopped: RunDir, key: str) -> None:
    with pytest.raises(DriftError, match="Round 3 has come past") as caught:
        check(stopped, key)
    assert f"rm -r {stopped.round(3).path}" in caught.value.message


@pytest.mark.parametrize("name", ["reference", "checkpoints/step-000001", "training"])
def test_training_that_has_begun_keeps_its_settings(stopped: RunDir, name: str) -> None:
    with stopped.round(3).commit(name, inputs={}) as draft:
        (draft.path / "x").write_text("x")
    with pytest.raises(DriftError, match="Round 3 has come past"):
        check(stopped, "train.max_grad_norm")


def test_processes_change_inside_a_round_when_accepted(stopped: RunDir) -> None:
    with stopped.round(3).commit("reference", inputs={}) as draft:
        (draft.path / "x").write_text("x")
    with pytest.raises(DriftError, match="come past"):
        check(stopped, "train.micro_batch_size")
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
