"""The loop end to end: what it commits, that kills do not change it, and what ends it."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import digests, in_child, tiny_config

from online_dpo import Campaign, CampaignError
from online_dpo.display.wording import remarks
from online_dpo.files import read_json
from online_dpo.store import RunDir
from online_dpo.tables import read_table


def run_it(config: dict[str, Any]) -> None:
    import online_dpo

    try:
        online_dpo.run(config)
    except CampaignError as error:
        print(error.message)
        raise SystemExit(error.exit_code) from None


def run_and_die(config: dict[str, Any], artifact: str, after: bool) -> None:
    """Run, and end by SIGKILL as the named artifact is committed: before its rename, or after."""
    from online_dpo.store import RoundDir

    finish = RoundDir.finish

    def finish_and_die(self: RoundDir, name: str, *args: Any, **kwargs: Any) -> Any:
        here = f"{self.number:03d}/{name}" == artifact
        if here and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        info = finish(self, name, *args, **kwargs)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return info

    RoundDir.finish = finish_and_die  # type: ignore[method-assign]
    run_it(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted campaign."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert in_child(run_it, tiny_config(run)) == 0
    return run


def test_every_round_commits_its_artifacts(finished: Path) -> None:
    run = RunDir(finished)
    names = {info.name for info in run.round(2).artifacts()}
    assert names == {
        "samples/part-00000",
        "samples/part-00001",
        "labels/part-00000",
        "labels/part-00001",
        "judge_check",
        "pairs",
        "reference",
        "training",
        "policy",
        "canary",
        "evaluation",
    }
    for number in (0, 1, 2):
        for info in run.round(number).artifacts():
            run.round(number).verify(info.name)
    assert not list(finished.rglob("*.partial"))


def test_the_policies_change_and_are_chained(finished: Path) -> None:
    run = RunDir(finished)
    hashes = [run.round(n).manifest()["policy"]["sha256"] for n in (0, 1, 2)]
    assert len(set(hashes)) == 3
    for number in (1, 2):
        plan = run.round(number).plan()
        assert plan.policy.sha256 == hashes[number - 1] == plan.reference.sha256
        assert plan.previous_manifest_sha256 == run.round(number - 1).manifest_sha256()


def test_the_first_batch_has_loss_ln2_and_margin_0(finished: Path) -> None:
    for number in (1, 2):
        steps = finished / f"rounds/{number:03d}/training/steps.jsonl"
        first = json.loads(steps.read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert first["margin"] == pytest.approx(0.0, abs=1e-5)


def test_the_samplers_log_probs_can_be_the_references(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", reference={"logps": "sampled"}, campaign={"rounds": 1})
    assert in_child(run_it, config) == 0
    campaign = Campaign(tmp_path / "run")
    training = campaign.rounds()[1].training
    assert training is not None
    assert training["pairs_from_sampler"] == training["pairs"] == training["pairs_checked"]
    assert 0 < training["sampled_max_error"] < 1e-4
    assert training["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert "came from the sampler" in " ".join(remarks(campaign.rounds()))


def test_samples_reconcile_with_pairs(finished: Path) -> None:
    for number in (1, 2):
        counts = read_json(finished / f"rounds/{number:03d}/manifest.json")["counts"]
        assert counts["samples"] == 32 == sum(counts["responses"].values())


def test_held_out_prompts_are_never_trained_on(finished: Path) -> None:
    rows = read_table(finished / "rounds/000/prompts/prompts.parquet")
    held_out = {row["id"] for row in rows if row["role"] == "eval"}
    assert len(held_out) == 8
    for number in (1, 2):
        assert not held_out & set(RunDir(finished).round(number).plan().prompt_ids)


STAGES = [
    ("000/policy", False),
    ("001/samples/part-00001", False),
    ("001/labels/part-00000", True),
    ("001/pairs", False),
    ("001/reference", True),
    ("002/checkpoints/step-000001", True),
    ("002/policy", False),
    ("002/canary", True),
    ("002/evaluation", False),
]


@pytest.mark.parametrize(("artifact", "after"), STAGES)
def test_a_kill_changes_nothing(finished: Path, tmp_path: Path, artifact: str, after: bool) -> None:
    config = tiny_config(tmp_path / "run")
    assert in_child(run_and_die, config, artifact, after) == -signal.SIGKILL
    assert in_child(run_it, config) == 0
    assert digests(tmp_path / "run") == digests(finished)


def test_a_finished_run_is_left_untouched(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert in_child(run_it, tiny_config(finished)) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_another_config_in_the_same_place_is_refused(finished: Path) -> None:
    config = tiny_config(finished, train={"learning_rate": 2e-3})
    assert in_child(run_it, config) == 3


def test_the_online_regime_carries_its_optimizer_through_a_kill(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "train": {"optimizer": "carry", "batch_size": 64},
        "reference": {"promote": "never"},
        "evaluation": {"every": 4},
        "campaign": {"rounds": 4},
    }
    whole, broken = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for path in (whole, broken):
        config = tiny_config(path, **sections)
        if path == broken:
            assert in_child(run_and_die, config, "003/optimizer", True) == -signal.SIGKILL
        assert in_child(run_it, config) == 0
    steps = [RunDir(whole).round(n).manifest()["optimizer_step"] for n in range(5)]
    assert steps == [0, 1, 2, 3, 4]
    assert digests(broken) == digests(whole)
