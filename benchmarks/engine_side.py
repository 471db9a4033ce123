"""This engine's side of the DPO benchmarks: the trainer's handler, called as a stage calls it.

Steps are timed by the events that it emits.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from turns import CountedTurns, PeakMemory, Turns
from workload import BETA, PLAN_SEED, DpoJob


class Over(Exception):
    """All turns are over: what follows training is not measured."""


def dpo(job: DpoJob, turns: Turns) -> None:
    """Score the reference and train."""
    import pyarrow.parquet as pq
    from flops import StepProbe

    from online_dpo.training.handler import Trainer

    memory = PeakMemory(job.device)
    turns.ready()
    with TemporaryDirectory() as name:
        folder = Path(name)
        few = folder / "few.parquet"
        pq.write_table(pq.read_table(job.pairs).slice(0, job.reference_pairs), few)
        turns.begin()
        trainer = Trainer(_settings(job))
        _score(trainer, job, Path(job.pairs), folder / "reference.parquet")
        turns.end()
        for _ in range(job.reference_turns):
            with turns.take():
                _score(trainer, job, few, folder / "few_reference.parquet")
        steps = CountedTurns(turns, job.step_sizes, probe=StepProbe(memory, profile=job.profile))
        steps.begin()
        try:
            trainer.dpo(
                emit=lambda event: _count(event, steps),
                model=_model(job),
                pairs=job.pairs,
                reference_logps=str(folder / "reference.parquet"),
                plan=_plan(job),
                optimizer=None,
                out=str(folder / "policy"),
                optimizer_out=None,
                checkpoints=str(folder / "checkpoints"),
                resume_from=None,
            )
        except Over:
            trainer.close()


def _settings(job: DpoJob) -> dict[str, Any]:
    from online_dpo.config import ModelConfig, TrainConfig

    train = TrainConfig(
        beta=BETA,
        learning_rate=job.learning_rate,
        schedule="linear",
        warmup=0.0,
        batch_size=job.batch_size,
        epochs=math.ceil(sum(job.step_sizes) * job.batch_size / job.num_pairs),
        checkpoint_every=0,
        precision=job.dtype,
        **job.settings,
    )
    return {
        "device": job.device,
        "threads": job.threads,
        "num_processes": 1,
        "train": train.model_dump(),
        "model": ModelConfig(path=job.model).model_dump(),
    }


def _model(job: DpoJob) -> dict[str, str]:
    return {"path": job.model, "sha256": "policy 0"}


def _score(trainer: Any, job: DpoJob, pairs: Path, out: Path) -> None:
    trainer.score_reference(
        emit=lambda event: None, model=_model(job), pairs=str(pairs), out=str(out)
    )


def _count(event: dict[str, Any], steps: CountedTurns) -> None:
    if event["event"] == "step" and steps.count(loss=event["metrics"]["loss"]):
        raise Over


def _plan(job: DpoJob) -> dict[str, Any]:
    return {
        "beta": BETA, "learning_rate": job.learning_rate, "seed": PLAN_SEED, "round": 1,
        "rounds": 1, "optimizer_step": 0,
    }  # fmt: skip
