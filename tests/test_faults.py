"""Faults that a campaign must name instead of training on them: signals, damage, changed judges."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import in_child, tiny_config

import online_dpo
from online_dpo import CampaignError
from online_dpo.campaign import resume
from online_dpo.errors import SignalError
from online_dpo.files import read_json
from online_dpo.store import RoundDir, RunDir


def run_it(config: dict[str, Any]) -> None:
    online_dpo.run(config)


def die_before(artifact: str) -> None:
    """End this process by SIGKILL before the named artifact is committed."""
    finish = RoundDir.finish

    def finish_or_die(self: RoundDir, name: str, *args: Any, **kwargs: Any) -> Any:
        if f"{self.number:03d}/{name}" == artifact:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, name, *args, **kwargs)

    RoundDir.finish = finish_or_die  # type: ignore[method-assign]


def stop_before(config: dict[str, Any], artifact: str) -> None:
    die_before(artifact)
    run_it(config)


def resume_it(run: str, overrides: list[str], expected_exit: int) -> None:
    """Resume, and leave with the exit code; the message goes beside the run."""
    try:
        resume(run, overrides=overrides, accept_change=True)
    except CampaignError as error:
        Path(run).with_suffix(".txt").write_text(f"{error.message}\n{error.remedy}")
        raise SystemExit(error.exit_code) from None


def term_while_loading(config: dict[str, Any], out: str) -> None:
    """SIGTERM in the middle of loading a model, where libraries catch what they can."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    calls: list[int] = []

    def load_and_signal(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(*args, **kwargs)

    transformers.AutoModelForCausalLM.from_pretrained = load_and_signal
    try:
        run_it(config)
    except SignalError as error:
        Path(out).write_text(f"{error.message} {error.remedy}")
        raise SystemExit(error.exit_code) from None


def test_a_signal_is_a_signal_wherever_it_arrives(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    out = tmp_path / "out.txt"
    assert in_child(term_while_loading, config, str(out)) == 143
    assert out.read_text() == f"Stopped by SIGTERM. online-dpo resume {tmp_path / 'run'}"
    assert in_child(run_it, config) == 0


def test_a_damaged_reference_is_corrupt_and_not_trained_against(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", reference={"promote": "never"})
    assert in_child(stop_before, config, "002/reference") == -signal.SIGKILL
    weights = tmp_path / "run/rounds/000/policy/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(bytes(data))
    assert in_child(resume_it, str(tmp_path / "run"), [], 9) == 9
    assert "model.safetensors is not what was committed" in (tmp_path / "run.txt").read_text()


def resume_and_stop_before(run: str, changes: list[str], artifact: str) -> None:
    die_before(artifact)
    resume_it(run, changes, 0)


def test_an_optional_section_can_be_taken_away(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", campaign={"rounds": 1})
    config["evaluation"] = {"judge": config["judge"]}
    assert in_child(run_it, config) == 0
    run = str(tmp_path / "run")
    changes = ["evaluation.judge=null", "campaign.rounds=2"]
    assert in_child(resume_it, run, changes, 0) == 0
    assert online_dpo.Campaign(run).config.evaluation.judge is None
    assert online_dpo.Campaign(run).state == "finished"


def test_win_rates_compare_scores_of_one_judge(tmp_path: Path) -> None:
    """Another judge scores earlier answers again, once, and a kill after that costs nothing."""
    config = tiny_config(tmp_path / "run", campaign={"rounds": 1})
    assert in_child(run_it, config) == 0
    run = RunDir(tmp_path / "run")
    scorers = "[{kind: lexicon, positive: [red, round], negative: [blue, small], weight: 1000}]"
    changes = [f"judge.options.scorers={scorers}", "campaign.rounds=3"]
    died = in_child(resume_and_stop_before, str(run.path), changes, "002/evaluation")
    assert died == -signal.SIGKILL
    again = [name.rpartition("-")[0] for name in run.round(2).children("rescored")]
    assert again == ["rescored/round-000", "rescored/round-001"]
    assert in_child(resume_it, str(run.path), [], 0) == 0
    first, second, third = (
        read_json(run.path / f"rounds/{n:03d}/evaluation/metrics.json") for n in (1, 2, 3)
    )
    assert abs(second["score"]["mean"]) > 100 * abs(first["score"]["mean"])
    assert 0.2 < second["win_rate_policy0"]["value"] < 1.0
    assert 0.2 < third["win_rate_policy0"]["value"] <= 1.0
    assert not run.round(3).children("rescored")
    asked = [e["purpose"] for e in run.events() if e.get("event") == "judged"]
    assert [asked.count(f"evaluation-{n:03d}") for n in (1, 2, 3)] == [1, 4, 1]


def test_more_rounds_do_not_change_a_begun_one(tmp_path: Path) -> None:
    train = {"optimizer": "carry", "batch_size": 2}
    config = tiny_config(tmp_path / "run", train=train)
    assert in_child(stop_before, config, "002/checkpoints/step-000002") == -signal.SIGKILL
    assert in_child(resume_it, str(tmp_path / "run"), ["campaign.rounds=3"], 0) == 0
    run = RunDir(tmp_path / "run")
    assert [run.round(n).plan().rounds for n in (1, 2, 3)] == [2, 2, 3]


def test_bfloat16_training_passes_its_canary(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", train={"precision": "bfloat16"}, campaign={"rounds": 1})
    assert in_child(run_it, config) == 0


@pytest.mark.parametrize(
    "sections",
    [
        {"sampling": {"update": "reload"}},
        {"train": {"devices": [0]}},
        {"compute": {"layout": "exit"}},
        {"judge": {"concurrency": 4}},
    ],
)
def test_settings_without_effect_are_refused_before_anything_runs(
    tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    config = tiny_config(tmp_path / "run", **sections)
    config["compute"]["device"] = "cpu"
    with pytest.raises(online_dpo.CampaignError):
        online_dpo.run(config)
    assert not (tmp_path / "run").exists()
