"""The training curves of this engine and of TRL's DPOTrainer on the same pairs in the same order.

    python benchmarks/curves.py [--size c] [--steps 64] [--learning-rate 2e-3] [--threads 2]

Both train a float32 policy over one round of pairs, each once, with AdamW, clipping and a linearly
falling learning rate. Prints the losses and their greatest relative difference; exits 1 where it is
more than 1% at any step.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import engine_side
import trl_side
from turns import Side, print_conditions, print_table, set_environment, take_turns
from workload import SIZES, new_job, prepare, reorder_pairs

TOLERANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="c")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    set_environment(args.threads)
    print_conditions(threads=args.threads, device="cpu")
    with TemporaryDirectory() as folder:
        ours, theirs = _losses(Path(folder), args)
    differences = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    shown = sorted({*range(0, args.steps, max(1, args.steps // 16)), args.steps - 1})
    print_table(
        ["step", "this engine", "TRL", "difference"],
        [
            [str(i + 1), f"{ours[i]:.6f}", f"{theirs[i]:.6f}", f"{differences[i]:.1e}"]
            for i in shown
        ],
    )
    print(f"greatest relative difference of {args.steps} steps: {max(differences):.1e}")
    sys.exit(max(differences) > TOLERANCE)


def _losses(folder: Path, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Every step's loss, here and there."""
    size = SIZES[args.size]
    job = replace(
        new_job(folder, size, turns=0, threads=args.threads, learning_rate=args.learning_rate),
        reference_pairs=args.steps * size.batch_size,
        warm_up=1,
        step_turns=args.steps - 2,
        steps=1,
    )
    prepare(folder, size, job, lengths="varied")
    reorder_pairs(Path(job.pairs), folder / "ordered.parquet", size.batch_size)
    settings = trl_side.tuned(
        micro_batch=size.batch_size, reference_batch=1, train_sampling_strategy="sequential"
    )
    ordered = replace(job, pairs=str(folder / "ordered.parquet"), settings=settings)
    sides = [
        Side("this engine", engine_side.dpo, job),
        Side("TRL", trl_side.dpo, ordered),
    ]
    take_turns(sides, job.num_turns, logs=folder)
    ours, theirs = ([figures["loss"] for figures in side.figures[1:]] for side in sides)
    return ours, theirs


if __name__ == "__main__":
    main()
