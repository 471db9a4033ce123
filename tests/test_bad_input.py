"""Bad input ends with its exit code, one cause, and nothing committed lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import in_child, tiny_config

from online_dpo.config_file import dump_yaml
from online_dpo.files import read_json
from online_dpo.store import RunDir
from online_dpo.tables import read_table

FLAWED_JUDGE = """\
import math, time

def raises(prompt, response):
    raise ZeroDivisionError("my own bug")

def nan(prompt, response):
    return math.nan

def hangs(prompt, response):
    time.sleep(600)

def text(prompt, response):
    return "good"

class Short:
    def score(self, prompt, responses):
        return [1.0]

def same(prompt, response):
    return 1.0
"""


def cli(arguments: list[str], log: str) -> None:
    """The command line in this process, what it prints going to a file."""
    from online_dpo.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["online-dpo", *arguments]
    main()


def run_config(tmp_path: Path, config: dict[str, Any], *more: str) -> tuple[int, str]:
    """Exit code and output of `online-dpo run`."""
    file = tmp_path / "demo.yaml"
    file.write_text(dump_yaml(config))
    log = tmp_path / "out.txt"
    code = in_child(cli, ["run", str(file), *more], str(log))
    return code, log.read_text()


def judged_by(tmp_path: Path, function: str, **judge: Any) -> dict[str, Any]:
    (tmp_path / "flawed.py").write_text(FLAWED_JUDGE)
    config = tiny_config(tmp_path / "run")
    name = f"{tmp_path / 'flawed.py'}:{function}"
    return {**config, "judge": {"name": name, **judge}}


@pytest.mark.parametrize(
    ("function", "judge", "said"),
    [
        ("raises", {}, "my own bug"),
        ("nan", {}, "nan"),
        ("hangs", {"timeout_s": 0.5}, "did not answer within 0.5 s"),
        ("text", {}, "'good'"),
        ("Short", {}, "1 score"),
    ],
)
def test_a_broken_judge_ends_with_5(
    tmp_path: Path, function: str, judge: dict[str, Any], said: str
) -> None:
    code, output = run_config(tmp_path, judged_by(tmp_path, function, **judge))
    assert code == 5, output
    assert said in output and output.count("error:") == 1 and "Traceback" not in output
    run = RunDir(tmp_path / "run")
    assert run.round(0).verify("policy")


def test_no_usable_pairs_end_with_6_and_keep_the_samples(tmp_path: Path) -> None:
    code, output = run_config(tmp_path, judged_by(tmp_path, "same"))
    assert code == 6, output
    assert "32 tied" in output
    assert RunDir(tmp_path / "run").round(1).children("labels")


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("nowhere:Judge", "No module named 'nowhere'"),
        ("missing.py:Judge", "'missing.py' does not exist"),
        ("heuristics", "There is no judge named 'heuristics'. Installed:"),
        ("json:NoSuch", "json has no 'NoSuch'"),
    ],
)
def test_a_judge_that_cannot_be_imported_ends_with_2(tmp_path: Path, judge: str, said: str) -> None:
    config = {**tiny_config(tmp_path / "run"), "judge": {"name": judge}}
    code, output = run_config(tmp_path, config)
    assert code == 2 and said in output, output


def test_unusable_prompts_end_with_2_and_say_why(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    (tmp_path / "prompts.jsonl").write_text('{"question": "why?"}\n{"prompt": ""}\nnonsense\n')
    code, output = run_config(tmp_path, config)
    assert code == 2, output
    assert "prompts.jsonl" in output and "'prompt'" in output


def test_bad_rows_among_good_ones_are_skipped_and_named(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", campaign={"rounds": 1})
    prompts = tmp_path / "prompts.jsonl"
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join(["not json", *lines, lines[0], '{"prompt": " "}']) + "\n")
    code, output = run_config(tmp_path, config)
    assert code == 0, output
    assert "prompts:1 skipped" in output and "duplicate" in output and "empty prompt" in output


def test_a_sources_name_is_in_every_table_and_every_figure(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", campaign={"rounds": 1})
    (tmp_path / "things.jsonl").write_text(
        "".join(f'{{"prompt": "small thing {i}:"}}\n' for i in range(24))
    )
    config["prompts"]["train"].append({"path": str(tmp_path / "things.jsonl"), "weight": 1.0})
    code, output = run_config(tmp_path, config)
    assert code == 0, output
    first = RunDir(tmp_path / "run").round(1).path
    both = {"prompts", "things"}
    tables = ["samples/part-00000/samples", "labels/part-00000/labels", "pairs/pairs"]
    for name in [*tables, "evaluation/answers"]:
        rows = read_table(first / f"{name}.parquet")
        assert {row["prompt_source"] for row in rows} == both, name
    metrics = read_json(first / "evaluation/metrics.json")
    whole = set(metrics) - {"by_source"}
    assert {name: set(figures) for name, figures in metrics["by_source"].items()} == {
        name: whole for name in both
    }
    pairs = read_json(first / "pairs/metrics.json")
    assert {name: row["prompts"] for name, row in pairs["by_source"].items()} == {
        "prompts": 4,
        "things": 4,
    }
    assert in_child(cli, ["status", str(tmp_path / "run")], str(tmp_path / "out.txt")) == 0
    assert "round 1 by source" in (tmp_path / "out.txt").read_text()


def test_an_unreadable_model_ends_with_2(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = tiny_config(tmp_path / "run")
    config["model"] = {"path": str(model)}
    code, output = run_config(tmp_path, config)
    assert code == 2 and "safetensors" in output, output
    (model / "model.safetensors").write_bytes(b"rubbish")
    code, output = run_config(tmp_path, config, "--run-dir", str(tmp_path / "run2"))
    assert code == 2 and str(model) in output, output


def test_a_gpu_that_is_not_there_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = tiny_config(tmp_path / "run", compute={"device": "cuda"})
    file = tmp_path / "demo.yaml"
    file.write_text(dump_yaml(config))
    done = subprocess.run(
        [sys.executable, "-m", "online_dpo.cli", "run", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no NVIDIA GPU" in done.stderr


def test_more_prompts_than_there_are_end_with_2(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", campaign={"prompts_per_round": 1000})
    code, output = run_config(tmp_path, config)
    assert code == 2 and "only 16 training prompts are usable" in output, output
    assert not RunDir(tmp_path / "run").round(0).has("policy")


def test_a_folder_with_other_things_is_not_taken(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    code, output = run_config(tmp_path, config)
    assert code == 2 and "not empty" in output, output
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_an_unfinished_run_says_how_to_resume(tmp_path: Path) -> None:
    config = judged_by(tmp_path, "same")
    assert run_config(tmp_path, config)[0] == 6
    code, output = run_config(tmp_path, config)
    assert code == 3, output
    assert f"to go on: online-dpo resume {tmp_path / 'run'}" in output


def test_code_of_a_run_directory_needs_trust(tmp_path: Path) -> None:
    config = judged_by(tmp_path, "same")
    assert run_config(tmp_path, config)[0] == 6
    log = tmp_path / "out.txt"
    arguments = ["resume", str(tmp_path / "run")]
    assert in_child(cli, arguments, str(log)) == 2
    trust = f"judge.name={tmp_path / 'flawed.py'}:same"
    assert f"--trust {trust}" in log.read_text()
    assert in_child(cli, [*arguments, "--trust", trust], str(log)) == 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_with_8_and_resumes_when_grown(tmp_path: Path, small_disk: Path) -> None:
    config = tiny_config(tmp_path / "run")
    run = small_disk / "run"
    code, output = run_config(tmp_path, config, "--run-dir", str(run))
    assert code == 8, output
    assert "No space left on device" in output and f"online-dpo resume {run}" in output
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    log = tmp_path / "out.txt"
    assert in_child(cli, ["resume", str(run)], str(log)) == 0, log.read_text()


def test_a_read_only_disk_ends_with_8(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    config = tiny_config(tmp_path / "run")
    code, output = run_config(tmp_path, config, "--run-dir", str(small_disk / "run"))
    assert code == 8 and "Read-only file system" in output, output
