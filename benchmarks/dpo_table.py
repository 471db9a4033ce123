"""Turns the measured sides of a DPO benchmark into a table of speeds, memory and utilisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import engine_side
import trl_side
from turns import Side, median, print_table, spread
from workload import DpoJob, Size, floor_flops, read_pairs

PASSES_TRAINING, PASSES_REFERENCE = 3, 1
"""Forward passes' worth of work: a backward pass is two."""

ENGINE, TUNED = "this engine", "TRL tuned"
SAMPLER = "this engine, sampler's log-probs"
HEADER = [
    "", "pairs/s", "ratio", "reference ms/pair", "training ms/pair", "+-", "peak MiB", "ratio",
    "GFLOP/pair in training", "MFU",
]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Medians over turns: seconds a pair of either kind, and what the last turn showed."""

    name: str
    reference_s: float
    training_s: float
    spread: float
    """Of training: half the distance of the quartiles over the median."""
    memory: int
    flops: float | None
    profile: str | None
    passes: int = PASSES_TRAINING + PASSES_REFERENCE

    @property
    def pairs_per_s(self) -> float:
        return 1 / (self.reference_s + self.training_s)


def measured(side: Side) -> Measured:
    """A side's figures; it may have had all its turns several times."""
    job: DpoJob = side.job
    runs = [side.seconds[i : i + job.num_turns] for i in range(0, len(side.seconds), job.num_turns)]
    first_step = 1 + job.reference_turns
    reference = [s for run in runs for s in run[1:first_step]]
    training = [s for run in runs for s in run[first_step + 1 : -1]]
    last = side.figures[-1]
    return Measured(
        name=side.name,
        reference_s=median(reference) / job.reference_pairs if reference else 0.0,
        training_s=median(training) / (job.steps * job.batch_size),
        spread=spread(training),
        memory=last["memory"],
        flops=last["flops"] / job.batch_size if "flops" in last else None,
        profile=last.get("profile"),
    )


def with_sampler_logps(engine: Measured) -> Measured:
    """The same without a reference pass: the sampler's log-probs are the reference's."""
    return Measured(
        SAMPLER, 0.0, engine.training_s, engine.spread, engine.memory, engine.flops, None,
        PASSES_TRAINING,
    )  # fmt: skip


def dpo_sides(
    job: DpoJob, *, engine: Mapping[str, Any], tuned: Mapping[str, Mapping[str, Any]]
) -> list[Side]:
    """The sides of the comparison, with this engine's settings and TRL's best ones by name."""
    return [
        Side(ENGINE, engine_side.dpo, replace(job, settings=engine)),
        *[
            Side(f"{TUNED}, {name}", trl_side.dpo, replace(job, settings=settings))
            for name, settings in tuned.items()
        ],
        Side("TRL out of the box", trl_side.dpo, replace(job, settings=trl_side.OUT_OF_THE_BOX)),
    ]


def print_comparison(size: Size, job: DpoJob, sides: Sequence[Side], peak: Side) -> None:
    """The table of the sides' figures, and a line with the floor.

    Ratios are to TRL's tuned sides: of speed to the fastest, of memory to the leanest of them.
    """
    results = [measured(side) for side in sides]
    theirs = [r for r in results if r.name.startswith(TUNED)]
    fastest = max(theirs, key=lambda r: r.pairs_per_s)
    leanest = min(theirs, key=lambda r: r.memory)
    results[1:1] = [with_sampler_logps(r) for r in results if r.name == ENGINE]
    forward = fmean(floor_flops(size, row) for row in read_pairs(Path(job.pairs)))
    rate = median([figures["rate"] for figures in peak.figures])
    print(f"{size.name}, {size.batch_size} pairs a step, {job.dtype}:\n")
    print_table(HEADER, [_row(result, fastest, leanest, forward, rate) for result in results])
    floors = [
        f"{passes * forward / 1e9:.1f} GFLOP a pair {what}, {rate / (passes * forward):.2f} pairs/s"
        f" ({rate / (passes * forward) / fastest.pairs_per_s:.1f} x TRL)"
        for passes, what in ((4, "with the reference pass"), (3, "without"))
    ]
    print(f"Floor at the {rate / 1e9:.0f} GFLOP/s of matrix products: {'; '.join(floors)}.\n")
    for result in results:
        if result.profile is not None:
            print(f"{result.name}:\n\n{result.profile}\n")


def _row(
    result: Measured, fastest: Measured, leanest: Measured, forward: float, peak: float
) -> list[str]:
    return [
        result.name,
        f"{result.pairs_per_s:.2f}",
        f"{result.pairs_per_s / fastest.pairs_per_s:.2f}",
        f"{1e3 * result.reference_s:.1f}",
        f"{1e3 * result.training_s:.1f}",
        f"{100 * result.spread:.0f}%",
        f"{result.memory / 2**20:.0f}",
        f"{result.memory / leanest.memory:.2f}",
        f"{result.flops / 1e9:.1f}" if result.flops is not None else "",
        f"{result.passes * forward * result.pairs_per_s / peak:.2f}",
    ]
