"""A whole round of online DPO here and in TRL's OnlineDPOTrainer, and the fixed cost of a round.

    python benchmarks/loop.py [--part round|fixed] [--rounds 5] [--batch-size 16] [--threads 2]
                              [--clock wall|cpu] [--dtype float32|bfloat16]

`round`: 256 prompts x 2 responses x 64 new tokens, judged by a rule, trained in optimizer steps of
`--batch-size` pairs against a fixed reference; a Llama of 1M parameters. Here that is a campaign
with all its files, in one process; there, as many steps of its trainer. In bfloat16 the weights
that are trained are float32 on both sides, and all else computes in bfloat16. `fixed`: the wall
time of a round less sampling, judging and training, for a model of 20M parameters, workers warm: in
the same process, and in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trl_side
from turns import (
    CountedTurns,
    Side,
    Turns,
    median,
    print_conditions,
    print_table,
    set_environment,
    spread,
    take_turns,
)
from workload import BETA, SIZES, LoopJob, write_model, write_prompts

PROMPTS, NEW_TOKENS, LEARNING_RATE = 256, 64, 1e-4
HELD_OUT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["round", "fixed"], nargs="+", default=["round", "fixed"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    set_environment(args.threads)
    print_conditions(threads=args.threads, device="cpu")
    for part in args.part:
        with TemporaryDirectory() as folder:
            {"round": compare_rounds, "fixed": show_fixed_cost}[part](Path(folder), args)


def compare_rounds(folder: Path, args: argparse.Namespace) -> None:
    given = _jobs(folder, "c", args, prompts=PROMPTS, new_tokens=NEW_TOKENS)
    tuned = {
        "sampling": {"batch_size": 2 * PROMPTS},
        "train": {"micro_batch_tokens": 4096},
        "compute": {"workers": "inline"},
    }
    sides = [
        Side("this engine", campaign, given(tuned)),
        *[
            Side(
                f"TRL tuned, micro-batch {n}", trl_side.online_dpo, given(trl_side.online_tuned(n))
            )
            for n in sorted({args.batch_size // 2, args.batch_size})
        ],
        Side("TRL out of the box", trl_side.online_dpo, given(trl_side.OUT_OF_THE_BOX)),
    ]
    for side in sides:
        side.clock = args.clock
    take_turns(sides, 1 + args.rounds, logs=folder)
    ours = median(sides[0].seconds[1:])
    print(
        f"A round of {PROMPTS} prompts x 2 x {NEW_TOKENS} tokens, {args.batch_size} pairs a step, "
        f"{args.dtype}:\n"
    )
    rows = []
    for side in sides:
        seconds = side.seconds[1:]
        ratio = f"{median(seconds) / ours:.2f}"
        rows.append([side.name, f"{median(seconds):.2f}", f"{100 * spread(seconds):.0f}%", ratio])
    print_table(["", "s/round", "+-", "of this engine's"], rows)
    _print_stages(folder / "run")


def show_fixed_cost(folder: Path, args: argparse.Namespace) -> None:
    given = _jobs(folder, "a", args, prompts=32, new_tokens=16)
    for workers in ("inline", "processes"):
        run = folder / workers
        job = replace(given({"compute": {"workers": workers}}), run=str(run))
        take_turns([Side("this engine", campaign, job)], 1 + args.rounds, logs=folder)
        print(f"Rounds of a 20M model, workers {workers}:\n")
        _print_stages(run)


def _jobs(
    folder: Path, size: str, args: argparse.Namespace, *, prompts: int, new_tokens: int
) -> Callable[[Mapping[str, Any]], LoopJob]:
    """Makes the sides' jobs, which differ in their settings alone."""
    write_model(folder / "model", SIZES[size])
    vocab_size = SIZES[size].model["vocab_size"]
    count = prompts * (2 + args.rounds) + HELD_OUT
    write_prompts(folder / "prompts.jsonl", SIZES[size], count)
    low_half = [str(token) for token in range(2, vocab_size // 2)]
    scorers = [{"kind": "lexicon", "positive": low_half, "per_length": True}]

    def job(settings: Mapping[str, Any]) -> LoopJob:
        return LoopJob(
            model=str(folder / "model"),
            prompts=str(folder / "prompts.jsonl"),
            run=str(folder / "run"),
            rounds=1 + args.rounds,
            prompts_per_round=prompts,
            new_tokens=new_tokens,
            batch_size=args.batch_size,
            learning_rate=LEARNING_RATE,
            threads=args.threads,
            dtype=args.dtype,
            scorers=scorers,
            settings=settings,
        )

    return job


def campaign(job: LoopJob, turns: Turns) -> None:
    """A campaign, a round a turn; the first includes round 0 and starting the workers."""
    import online_dpo
    from online_dpo.progress import SilentProgress

    class Progress(SilentProgress):
        def round(self, number: int, of: int) -> None:
            if number > 1 and rounds.count():
                raise Over

    turns.ready()
    rounds = CountedTurns(turns, [1] * job.rounds)
    rounds.begin()
    with contextlib.suppress(Over):
        online_dpo.run(_config(job), run_dir=job.run, progress=Progress())


class Over(Exception):
    """The measured rounds are over; the campaign's last one, which evaluates, is not run."""


def _config(job: LoopJob) -> dict[str, Any]:
    config: dict[str, dict[str, Any]] = {
        "model": {"path": job.model, "dtype": job.dtype},
        "prompts": {"train": [{"path": job.prompts}], "holdout": HELD_OUT},
        "sampling": {"sampler": "transformers", "n": 2, "max_new_tokens": job.new_tokens},
        "judge": {"name": "heuristic", "options": {"scorers": job.scorers}},
        "train": {
            "beta": BETA,
            "optimizer": "carry",
            "learning_rate": job.learning_rate,
            "batch_size": job.batch_size,
            "precision": job.dtype,
            "checkpoint_every": 0,
        },
        "reference": {"promote": "never"},
        "evaluation": {"every": 1000, "max_new_tokens": 8},
        "compute": {"device": "cpu", "threads": job.threads},
        "campaign": {"rounds": 1 + job.rounds, "prompts_per_round": job.prompts_per_round},
    }
    for section, fields in job.settings.items():
        config[section] |= fields
    return config


def _print_stages(run: Path) -> None:
    """Where the campaign's time went, the first round left out; medians, in seconds."""
    import online_dpo

    rounds = [r for r in online_dpo.Campaign(run).rounds() if r.round > 1]
    stages = sorted({stage for r in rounds for stage in r.busy_s})
    figures = {
        **{stage: [r.busy_s.get(stage, 0.0) for r in rounds] for stage in stages},
        "fixed cost": [r.fixed_s for r in rounds if r.fixed_s is not None],
        "wall": [r.wall_s for r in rounds if r.wall_s is not None],
    }
    print_table(
        ["stage", "median s", "longest s"],
        [[name, f"{median(s):.3f}", f"{max(s):.3f}"] for name, s in figures.items()],
    )


if __name__ == "__main__":
    main()
