"""Several verdicts on one thing made into one, by a rule; pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

Rule = Literal["majority", "mean", "unanimous"]
"""How votes in [0, 1] become one: see `combine_votes`."""


def combine_votes(votes: Sequence[float], rule: Rule) -> float:
    """One p from the p of each voter; 0.5 is a tie, in a vote as in the result.

    mean: their mean. majority: 1 or 0 where more than half of the votes lie on that side of 0.5,
    a tie otherwise. unanimous: 1 or 0 where all do, a tie otherwise. The order of the votes does
    not matter, and with every vote turned into 1 - p the result is too. Needs at least one vote.
    """
    assert votes, "no votes to combine"
    if rule == "mean":
        return fmean(sorted(votes))
    needed = len(votes) if rule == "unanimous" else len(votes) // 2 + 1
    if sum(vote > 0.5 for vote in votes) >= needed:
        return 1.0
    return 0.0 if sum(vote < 0.5 for vote in votes) >= needed else 0.5
