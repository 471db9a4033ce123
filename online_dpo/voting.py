"""Several verdicts on one thing made into one, by a rule; pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import Literal

Rule = Literal["majority", "mean", "unanimous"]
"""How votes in [0, 1] become one: see `combine_votes`."""


def combine_votes(
    votes: Sequence[float], rule: Rule, *, weights: Sequence[float] | None = None
) -> float:
    """One p from the p of each voter; 0.5 is a tie, in a vote as in the result.

    mean: their mean. majority: 1 or 0 where more than half of the votes lie on that side of 0.5,
    a tie otherwise. unanimous: 1 or 0 where all do, a tie otherwise. `weights`, positive, one a
    vote, say how much each counts in the first two; without them all count alike. The order of the
    votes does not matter, and with every vote turned into 1 - p the result is too. Needs at least
    one vote.
    """
    assert votes, "no votes to combine"
    counts = [1.0] * len(votes) if weights is None else list(weights)
    total = fsum(counts)
    if rule == "mean":
        return fsum(n * p for p, n in zip(votes, counts, strict=True)) / total
    if rule == "unanimous":
        return 1.0 if all(p > 0.5 for p in votes) else 0.0 if all(p < 0.5 for p in votes) else 0.5
    first = fsum(n for p, n in zip(votes, counts, strict=True) if p > 0.5)
    second = fsum(n for p, n in zip(votes, counts, strict=True) if p < 0.5)
    return 1.0 if 2 * first > total else 0.0 if 2 * second > total else 0.5
