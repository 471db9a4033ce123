"""Runs a list of a Trainer's calls in a process of its own; `accelerate launch` starts several.

    python trainer_calls.py CALLS.json RESULTS.json

CALLS has `settings` and `calls` ([method, keyword arguments]), and `kill_at`: the step whose
checkpoint event ends the process by SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from online_dpo.config import ModelConfig, TrainConfig
from online_dpo.models import Dtype
from online_dpo.training.handler import Trainer


def settings(*, num_processes: int = 1, dtype: Dtype = "float32", **train: Any) -> dict[str, Any]:
    """A trainer's settings on one CPU thread; `train` are TrainConfig's fields."""
    return {
        "device": "cpu",
        "threads": 1,
        "num_processes": num_processes,
        "train": TrainConfig(**train).model_dump(),
        "model": ModelConfig(path="unused", dtype=dtype).model_dump(),
    }


def run(job: dict[str, Any], results: Path) -> None:
    """Make the calls; write their results and events."""
    kill_at = job.get("kill_at")
    events: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "checkpoint" and event["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(job["settings"])
    values = [getattr(trainer, method)(emit=emit, **kwargs) for method, kwargs in job["calls"]]
    if trainer.accelerator.is_main_process:
        results.write_text(json.dumps({"results": values, "events": events}))
    trainer.close()


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
