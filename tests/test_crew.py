"""Where the workers of a config run, and what starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_readme import DOCS, block
from tiny import digests, in_child, tiny_config

from online_dpo.config import Config
from online_dpo.config_file import config_from_dict, dump_yaml
from online_dpo.crew import Crew, choose_sampler, trainer_launcher
from online_dpo.errors import ConfigError
from online_dpo.store import RunDir


def config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    return config_from_dict(tiny_config(tmp_path / "run", **sections)).config


@pytest.mark.parametrize(
    ("wanted", "gpu", "vllm", "expected"),
    [
        ("auto", True, True, "vllm"),
        ("auto", True, False, "transformers"),
        ("auto", False, True, "transformers"),
        ("vllm", False, True, "vllm"),
        ("transformers", True, True, "transformers"),
    ],
)
def test_auto_takes_vllm_where_it_finds_a_gpu(
    tmp_path: Path, wanted: str, gpu: bool, vllm: bool, expected: str
) -> None:
    settings = config(tmp_path, sampling={"sampler": wanted})
    assert choose_sampler(settings, gpu=gpu, vllm=vllm) == expected


def test_a_missing_vllm_is_named(tmp_path: Path) -> None:
    settings = config(tmp_path, sampling={"sampler": "vllm"})
    with pytest.raises(ConfigError, match="vllm is not installed"):
        choose_sampler(settings, gpu=True, vllm=False)


def test_one_process_needs_no_launcher_and_several_take_accelerates(tmp_path: Path) -> None:
    assert len(trainer_launcher(config(tmp_path))) == 1
    several = config(tmp_path, train={"num_processes": 4, "launch": {"main_process_port": 29512}})
    command = trainer_launcher(several)
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--num_processes"] == "4" and options["--main_process_port"] == "29512"


def test_an_endpoints_key_is_asked_for_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = {"url": "http://localhost:1/v1", "api_key_env": "GPU1_KEY"}
    sampling = {"sampler": "openai_server", "endpoints": [endpoint], "reload_command": "true"}
    monkeypatch.delenv("GPU1_KEY", raising=False)
    with pytest.raises(ConfigError, match="GPU1_KEY is not set.*endpoints.0.api_key_env"):
        Crew(config(tmp_path, sampling=sampling), run=tmp_path)
    monkeypatch.setenv("GPU1_KEY", "secret")
    Crew(config(tmp_path, sampling=sampling), run=tmp_path)


def run_it(config: dict[str, Any]) -> None:
    import online_dpo

    online_dpo.run(config)


@pytest.mark.timeout(300)
def test_two_processes_that_shard_the_policy_run_a_campaign(tmp_path: Path) -> None:
    one = tiny_config(tmp_path / "one" / "run", campaign={"rounds": 1})
    sharded = {"num_processes": 2, "parallel": "fsdp"}
    two = tiny_config(tmp_path / "two" / "run", campaign={"rounds": 1}, train=sharded)
    assert in_child(run_it, one) == 0
    assert in_child(run_it, two, timeout_s=280) == 0
    single, double = (RunDir(tmp_path / name / "run") for name in ("one", "two"))
    names = [{i.name for i in run.round(1).artifacts()} for run in (single, double)]
    assert names[0] == names[1]
    from safetensors.torch import load_file

    policies = [
        load_file(run.path / "rounds/001/policy/model.safetensors") for run in (single, double)
    ]
    start = load_file(single.path / "rounds/000/policy/model.safetensors")
    for name, tensor in policies[0].items():
        assert (policies[1][name] - tensor).abs().max() < 1e-4, name
    assert any((policies[0][name] - start[name]).abs().max() > 1e-4 for name in start)
    assert digests(double.path)


SCONTROL = """#!/bin/bash
printf '127.0.0.1\\n127.0.0.1\\n'
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 setsid "$@" &
trap "kill -KILL -- -$!" TERM
wait
"""
"""Slurm's part on one machine: a step with a process group of its own."""

ACCELERATE = """#!/bin/bash
exec python -m accelerate.commands.accelerate_cli "$@"
"""
"""Wherever it is installed."""


@pytest.mark.timeout(400)
def test_a_second_machine_joins_the_training_as_the_docs_have_it(tmp_path: Path) -> None:
    """The job of gpus.md with two launchers on this machine; submitted again, it resumes."""
    run = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tiny_config(run, campaign={"rounds": 1})))
    job = block(DOCS / "gpus.md", "bash", "#SBATCH")
    for old, new in {
        "CONFIG=fsdp.yaml": f"CONFIG={tmp_path / 'tiny.yaml'}",
        "RUN=runs/fsdp": f"RUN={run}",
        "GPUS=8": "GPUS=1",
        "PORT=29500": f"PORT={_two_free_ports()}",
    }.items():
        assert old in job
        job = job.replace(old, new)
    programs = {"job": job, "scontrol": SCONTROL, "srun": SRUN, "accelerate": ACCELERATE}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    for _ in range(2):
        with subprocess.Popen(
            ["bash", str(tmp_path / "job")],
            env={**os.environ, **slurm, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=180)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert process.returncode == 0, output
    assert RunDir(run).round(1).finished


def _two_free_ports() -> int:
    """The first of two neighbours."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = int(server.getsockname()[1])
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port
