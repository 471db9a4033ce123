"""DPO training here and in TRL on one GPU, side by side: 0.5B and 1.5B random weights, bfloat16.

    python benchmarks/gpu.py [--sizes 0.5B 1.5B] [--turns 4] [--minutes 9]
    python benchmarks/gpu.py --device cpu --tiny        tries it out without a GPU

The shapes are Qwen2.5's, made from a config: nothing is downloaded. Each side has the whole GPU to
itself, in a fresh process, one after the other and then once more. TRL's tuned side is the fastest
of the settings in CANDIDATES that fit into memory. A second turn that would pass `--minutes` is
left out. Tables as of dpo_step.py; memory is the highest that torch allocated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import trl_side
from dpo_table import TUNED, dpo_sides, measured, print_comparison
from flops import PeakJob, matmul_peak
from turns import Side, SideEnded, print_conditions, set_environment, take_turns
from workload import SIZES, DpoJob, Size, new_job, prepare

CANDIDATES = {
    "micro-batch 8": trl_side.tuned(micro_batch=8, reference_batch=8),
    "micro-batch 2": trl_side.tuned(micro_batch=2, reference_batch=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=["0.5B", "1.5B"], default=["0.5B", "1.5B"])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    set_environment(args.threads)
    print_conditions(threads=args.threads, device=args.device)
    sizes = ["tiny"] if args.tiny else args.sizes
    for number, key in enumerate(sizes, start=1):
        until = time.monotonic() + (deadline - time.monotonic()) / (1 + len(sizes) - number)
        with TemporaryDirectory() as name:
            folder = Path(name)
            job = new_job(
                folder,
                SIZES[key],
                turns=args.turns,
                device=args.device,
                dtype="bfloat16",
                threads=args.threads,
            )
            prepare(folder, SIZES[key], job, lengths="varied")
            _compare(SIZES[key], job, folder, until)


def _compare(size: Size, job: DpoJob, folder: Path, until: float) -> None:
    began = time.monotonic()
    peak = Side("peak", matmul_peak, PeakJob(job.device, job.dtype, "wall", job.num_turns))
    take_turns([peak], job.num_turns, logs=folder)
    sides = dpo_sides(job, engine={}, tuned=CANDIDATES)
    fitting = [side for side in sides if _runs(side, job, folder)]
    candidates = [side for side in fitting if side.name.startswith(TUNED)]
    best = min(candidates, key=_seconds_per_pair)
    again = [s for s in fitting if s not in candidates or s is best]
    if time.monotonic() + (time.monotonic() - began) * len(again) / len(fitting) < until:
        for side in again:
            _runs(side, job, folder)
    print_comparison(size, job, fitting, peak)


def _runs(side: Side, job: DpoJob, folder: Path) -> bool:
    """All turns of one side alone; False, with the reason printed, where it does not get there."""
    before = len(side.seconds)
    try:
        take_turns([side], job.num_turns, logs=folder)
    except SideEnded as error:
        del side.seconds[before:], side.figures[before:]
        print(f"{side.name} is left out: {str(error).splitlines()[-1]}\n")
        return before > 0
    return True


def _seconds_per_pair(side: Side) -> float:
    return 1 / measured(side).pairs_per_s


if __name__ == "__main__":
    main()
