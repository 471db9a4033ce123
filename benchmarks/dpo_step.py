"""DPO training here and in TRL's DPOTrainer, side by side on the same tokens: speed and memory.

    python benchmarks/dpo_step.py [--sizes a b c] [--dtype float32|bfloat16] [--threads 2]
                                  [--lengths fixed|varied] [--turns 7] [--clock wall|cpu]
                                  [--engine KEY=VALUE ...] [--search [NAME ...]] [--profile]

For each size a table: pairs a second with the reference pass counted, its two parts, the peak of
memory over the imports, what a training step multiplied, and the model's FLOP utilisation against
the matrix products that the machine reached in the same minutes. The floor is the time that the
least work would take at that rate. `--search` compares TRL's settings instead, of which the best
are its tuned side; `--profile` prints where a step of each side spends its time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trl_side
from dpo_table import dpo_sides, print_comparison
from flops import PeakJob, matmul_peak
from turns import Side, print_conditions, set_environment, take_turns
from workload import SIZES, DpoJob, Size, new_job, prepare

ENGINE: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {},
    "c": {"micro_batch_tokens": 2048},
    "tiny": {},
}
"""TrainConfig's fields by size, where its defaults are not the best."""

TUNED = {"a": (2, 1), "b": (1,), "c": (16, 1), "tiny": (1,)}
"""TRL's micro-batches by size: the fastest of `--search`, and 1, which takes least memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=sorted(TUNED), default=["a", "b", "c"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", choices=["fixed", "varied"], default="fixed")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--engine", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--search", nargs="*", metavar="NAME")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    set_environment(args.threads)
    print_conditions(threads=args.threads, device="cpu")
    for key in args.sizes:
        with TemporaryDirectory() as name:
            job = new_job(
                Path(name),
                SIZES[key],
                turns=args.turns,
                dtype=args.dtype,
                threads=args.threads,
                profile=args.profile,
            )
            prepare(Path(name), SIZES[key], job, lengths=args.lengths)
            if args.search is None:
                sides = dpo_sides(
                    job, engine={**ENGINE[key], **_parsed(args.engine)}, tuned=_tuned(TUNED[key])
                )
            else:
                sides = _candidates(job, TUNED[key][0], args.search)
            _compare(SIZES[key], job, sides, folder=Path(name), clock=args.clock)


def _parsed(items: list[str]) -> dict[str, Any]:
    """KEY=VALUE with values in JSON."""
    return {key: json.loads(value) for key, value in (item.split("=", 1) for item in items)}


def _tuned(micro_batches: Iterable[int]) -> dict[str, dict[str, Any]]:
    return {
        f"micro-batch {n}": trl_side.tuned(micro_batch=n, reference_batch=n) for n in micro_batches
    }


def _candidates(job: DpoJob, best: int, names: list[str]) -> list[Side]:
    """TRL's settings that may be its best; all of them, or those of the names given."""
    batches = [n for n in sorted({1, 2, 4, job.batch_size}) if job.batch_size % n == 0]
    settings = _tuned(batches)
    given = settings[f"micro-batch {best}"]
    settings |= {name: {**given, **others} for name, others in trl_side.VARIATIONS.items()}
    named = {name: value for name, value in settings.items() if not names or name in names}
    return dpo_sides(job, engine={}, tuned=named)[1:-1]


def _compare(size: Size, job: DpoJob, sides: list[Side], *, folder: Path, clock: str) -> None:
    peak = Side("peak", matmul_peak, PeakJob("cpu", job.dtype, clock, job.num_turns))
    for side in (*sides, peak):
        side.clock = clock
    take_turns([*sides, peak], job.num_turns, logs=folder)
    print_comparison(size, job, sides, peak)


if __name__ == "__main__":
    main()
