"""Lists of a Trainer's calls, made in processes of their own: fresh ones, or a pair that trains.

A job has `settings` and `calls` ([method, keyword arguments]), and may have `kill_at`: the step
whose checkpoint event ends the process by SIGKILL. Each job has a Trainer of its own.
"""

from __future__ import annotations

import json
import multiprocessing.context
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from online_dpo.config import ModelConfig, TrainConfig
from online_dpo.models.loading import Dtype
from online_dpo.training.handler import Trainer


def settings(*, num_processes: int = 1, dtype: Dtype = "float32", **train: Any) -> dict[str, Any]:
    """A trainer's settings on one CPU thread; `train` are TrainConfig's fields."""
    return {
        "device": "cpu",
        "threads": 1,
        "num_processes": num_processes,
        "train": TrainConfig(num_processes=num_processes, **train).model_dump(),
        "model": ModelConfig(path="unused", dtype=dtype).model_dump(),
    }


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts fresh processes that need not import torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer_calls", "transformers.models.llama.modeling_llama"])
    return context


def run_pair(jobs: list[dict[str, Any]], results: Path, *, timeout_s: float = 240.0) -> None:
    """`run` in two processes that train together, as `accelerate launch` would have started them.

    On a CPU `accelerate launch --cpu --num_processes 2` starts one process.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = fork_server()
    pair = [context.Process(target=_run_rank, args=(r, port, jobs, results)) for r in (0, 1)]
    for process in pair:
        process.start()
    deadline = time.monotonic() + timeout_s
    # One that fails leaves the other waiting for it.
    while all(p.exitcode in (None, 0) for p in pair) and any(p.is_alive() for p in pair):
        assert time.monotonic() < deadline, "the pair did not end"
        time.sleep(0.05)
    for process in pair:
        process.kill()
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]


def _run_rank(rank: int, port: int, jobs: list[dict[str, Any]], results: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    run(jobs, results)


def run(jobs: list[dict[str, Any]], results: Path) -> None:
    """Make the calls; write what each job returned, its events and how its model lay in memory."""
    trainers = [Trainer(job["settings"]) for job in jobs]
    done = [_make_calls(trainer, job) for trainer, job in zip(trainers, jobs, strict=True)]
    if trainers[0].accelerator.is_main_process:
        results.write_text(json.dumps(done))
    trainers[0].close()


def _make_calls(trainer: Trainer, job: dict[str, Any]) -> dict[str, Any]:
    events: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "checkpoint" and event["step"] == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    results = [getattr(trainer, method)(emit=emit, **kwargs) for method, kwargs in job["calls"]]
    layout = _layout(trainer)
    trainer.models.clear()
    return {"results": results, "events": events, "layout": layout}


def _layout(trainer: Trainer) -> dict[str, Any]:
    """The number of processes, and which share of each weight's elements this one holds."""
    policy = trainer.models._policy
    weights = {} if policy is None else dict(policy.model.named_parameters())
    return {
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "shares": {
            name: weight.to_local().numel() / weight.numel()
            for name, weight in weights.items()
            if isinstance(weight, DTensor)
        },
    }
