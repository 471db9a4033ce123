"""The learning rate's shape: warm-up, then decay, over a round or a whole campaign."""

from __future__ import annotations

import math


def lr_multiplier(step: int, *, steps: int, warmup: float, schedule: str) -> float:
    """The factor in (0, 1] on the peak learning rate at the 0-based `step` of `steps`.

    Warm-up takes the first share `warmup` of the steps and ends at 1; then `cosine` and `linear`
    fall towards 0, which they would reach at the step after the last, and `constant` stays. No step
    is idle: the first of few steps, or the only one, has a factor above 0. A schedule that spans
    several stretches of equal length passes the step within the whole span.
    """
    begin, end = step / steps, (step + 1) / steps
    if begin < warmup:
        return min(1.0, end / warmup)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (begin - warmup) / (1.0 - warmup)) if warmup < 1.0 else 0.0
    if schedule == "linear":
        return 1.0 - progress
    assert schedule == "cosine", schedule
    return 0.5 * (1.0 + math.cos(math.pi * progress))
