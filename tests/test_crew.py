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
from tiny import digests, in_child, tiny_config

from online_dpo.config import Config
from online_dpo.config_file import config_from_dict
from online_dpo.crew import choose_sampler, trainer_launcher
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


def run_it(config: dict[str, Any]) -> None:
    import online_dpo

    online_dpo.run(config)


@pytest.mark.timeout(300)
def test_two_training_processes_run_a_campaign(tmp_path: Path) -> None:
    one = tiny_config(tmp_path / "one" / "run", campaign={"rounds": 1})
    two = tiny_config(tmp_path / "two" / "run", campaign={"rounds": 1}, train={"num_processes": 2})
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


def run_with_token(config: dict[str, Any], token: str) -> None:
    os.environ["ONLINE_DPO_TOKEN"] = token
    run_it(config)


@pytest.mark.timeout(300)
def test_a_second_machine_joins_the_training(tmp_path: Path) -> None:
    """Two launchers on this machine, the second started by hand as on another one."""
    ports = [_free_port(), _free_port()]
    run = tmp_path / "run"
    launch = {
        "num_machines": 2,
        "machine_rank": 0,
        "main_process_ip": "127.0.0.1",
        "main_process_port": ports[0],
    }
    settings = tiny_config(
        run,
        campaign={"rounds": 1},
        train={"num_processes": 2, "listen": f"127.0.0.1:{ports[1]}", "launch": launch},
    )
    environment = {
        **os.environ,
        "ONLINE_DPO_SOCKET": f"tcp:127.0.0.1:{ports[1]}",
        "ONLINE_DPO_TOKEN": "a shared secret",
        "ONLINE_DPO_RUN": str(tmp_path),
    }
    options = {**launch, "machine_rank": 1, "num_processes": 2, "mixed_precision": "no"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command += ["--dynamo_backend", "no", "-m", "online_dpo.worker_main"]
    other = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert in_child(run_with_token, settings, "a shared secret", timeout_s=280) == 0
        assert other.wait(timeout=60) != 0
    finally:
        if other.poll() is None:
            os.killpg(other.pid, signal.SIGKILL)
    assert RunDir(run).round(1).has("policy")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
