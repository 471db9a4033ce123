"""What an end prints is true: what is safe lies on the disk, and the printed command goes on."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_fixture import make_run
from test_bad_input import cli, run_config
from tiny import in_child, tiny_config

from online_dpo.drift import current_config
from online_dpo.endings import remedy_for, safe_on_disk
from online_dpo.errors import BudgetError, CorruptError, JudgeError
from online_dpo.store import RunDir


def printed(output: str, what: str) -> str:
    """The text of the line that begins so."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"{what}: ")]
    return line.partition(": ")[2]


def obey(remedy: str, log: Path) -> int:
    """Run the printed commands, one by one; the exit code of the last."""
    code = 0
    for command in remedy.split("; "):
        name, *arguments = shlex.split(command)
        if name == "rm":
            assert arguments[0] == "-r"
            for path in map(Path, arguments[1:]):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif name == "mv":
            shutil.move(*arguments)
        else:
            assert name == "online-dpo"
            code = in_child(cli, arguments, str(log))
    return code


def test_a_diverged_round_trains_again_on_its_pairs(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", train={"learning_rate": 1e30}, campaign={"rounds": 1})
    code, output = run_config(tmp_path, config)
    assert code == 7, output
    safe = "of round 1: samples (2 parts), labels (2 parts), judge_check, pairs"
    assert safe in printed(output, "safe")
    pairs = tmp_path / "run/rounds/001/pairs/pairs.parquet"
    before = (pairs.read_bytes(), pairs.stat().st_mtime_ns)
    remedy = printed(output, "to go on").replace("=5e+29", "=1e-3")
    assert obey(remedy, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert (pairs.read_bytes(), pairs.stat().st_mtime_ns) == before
    assert RunDir(tmp_path / "run").round(1).plan().learning_rate == 1e-3


def test_a_diverged_fine_tuning_starts_over(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", campaign={"rounds": 1})
    config["sft"] |= {"learning_rate": 1e30, "epochs": 1}
    code, output = run_config(tmp_path, config)
    assert code == 7, output
    remedy = printed(output, "to go on").replace("=5e+29", "=1e-3")
    assert obey(remedy, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert RunDir(tmp_path / "run").round(1).finished


def test_a_margin_that_was_too_wide_is_taken_back(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", pairs={"min_margin": 100}, campaign={"rounds": 1})
    code, output = run_config(tmp_path, config)
    assert code == 6, output
    assert obey(printed(output, "to go on"), tmp_path / "log") == 0


def test_a_selectors_fault_is_named_and_an_unforeseen_one_has_a_way_on_too(tmp_path: Path) -> None:
    selector = tmp_path / "chooses.py"
    selector.write_text("def choose(prompt, candidates, rng):\n    raise KeyError('mine')\n")
    config = tiny_config(tmp_path / "run", pairs={"selector": f"{selector}:choose"})
    code, output = run_config(tmp_path, config)
    assert code == 2 and "chooses.py:choose' failed on prompt" in output, output
    assert "KeyError: 'mine'" in printed(output, "error")
    (tmp_path / "run/events.jsonl").unlink()
    (tmp_path / "run/events.jsonl").mkdir()  # nothing that we would expect
    log = tmp_path / "log"
    assert in_child(cli, shlex.split(printed(output, "to go on"))[1:], str(log)) == 1
    output = log.read_text()
    assert output.count("Traceback") == 1
    assert "Unexpected IsADirectoryError" in printed(output, "error")
    assert printed(output, "to go on").startswith(f"online-dpo resume {tmp_path / 'run'} --trust")


@pytest.fixture
def stopped(tmp_path: Path) -> RunDir:
    """Rounds 0 to 2 are done; round 3 has its first shard."""
    return RunDir(make_run(tmp_path, rounds=3, finished=2))


def remedy(run: RunDir, error: Any) -> str:
    return remedy_for(error, run, current_config(run)) or ""


def test_what_is_safe_is_what_is_there(stopped: RunDir) -> None:
    assert safe_on_disk(stopped) == "rounds 0 to 2; of round 3: samples (1 part)."
    assert safe_on_disk(RunDir(stopped.path / "nowhere")) is None


def test_damage_of_the_round_under_way_is_made_again(stopped: RunDir) -> None:
    third = stopped.round(3)
    resume = f"online-dpo resume {stopped.path}"
    for name in ("labels/part-00000", "pairs", "reference", "policy"):
        with third.commit(name, inputs={}) as draft:
            (draft.path / "x").write_text("x")
    shard = CorruptError(f"{third.path}/samples/part-00000/samples.parquet is missing.")
    parts = " ".join(f"{third.path}/{name}/part-00000" for name in ("samples", "labels"))
    assert remedy(stopped, shard) == f"rm -r {parts}; {resume}"
    policy = CorruptError(f"{third.path}/policy/model.safetensors is not what was committed.")
    assert remedy(stopped, policy) == f"rm -r {third.path}/policy; {resume}"
    plan = CorruptError(f"{third.path}/round.json is not valid JSON.")
    assert remedy(stopped, plan) == f"rm -r {third.path}; {resume}"
    earlier = CorruptError(f"{stopped.round(1).path}/policy/model.safetensors is missing.")
    assert remedy(stopped, earlier) == f"bring the file back from a copy, then: {resume}"


LIMITS = {"max_usd": 3.0, "max_calls": 7, "max_tokens": 10_000_000}


def test_a_limit_that_was_reached_is_the_one_to_raise(tmp_path: Path) -> None:
    judge = {"name": "llm_pairwise", "options": {"model": "m"}, "budget": LIMITS}
    run = RunDir(make_run(tmp_path, rounds=3, finished=2, config={"judge": judge}))
    for name, limit in LIMITS.items():
        spent = BudgetError(f"No room for another call. Raise judge.budget.{name} to go on.")
        assert remedy(run, spent).endswith(f"--set judge.budget.{name}={2 * limit:.15g}")


def test_a_judge_that_gave_too_few_verdicts_is_borne_on_demand(stopped: RunDir) -> None:
    invalid = JudgeError("... and judge.max_invalid is 0.2 ... Mend the judge, or raise it.")
    assert remedy(stopped, invalid).endswith("--set judge.max_invalid=1")
    assert remedy(stopped, JudgeError("HTTP 500")).endswith(str(stopped.path))
