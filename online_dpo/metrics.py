"""Figures of a round: win rates with intervals, drift, diversity, length; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Z95 = 1.959963984540054
"""The normal quantile of a two-sided 95% interval."""


@dataclass(frozen=True)
class Rate:
    """A share in [0, 1] with its 95% interval and the number of observations."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (0 for a single observation)."""

    mean: float
    stderr: float
    count: int


def wilson(outcomes: Sequence[float]) -> Rate | None:
    """The win rate over outcomes in [0, 1] (tie 0.5) with Wilson's score interval (1927).

    Ties enter the interval as half wins, which makes it wider than it need be, never narrower.
    None where there is no outcome.
    """
    n = len(outcomes)
    if n == 0:
        return None
    share = sum(outcomes) / n
    z2 = Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Rate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def win(score: float, other: float) -> float:
    """1 where `score` is higher, 0.5 for a tie, else 0."""
    return 1.0 if score > other else 0.5 if score == other else 0.0


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error; None for no values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, 0.0, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def kl(
    policy_logps: Sequence[Sequence[float]], reference_logps: Sequence[Sequence[float]]
) -> tuple[Estimate | None, float | None]:
    """KL(policy || reference) in nats per sequence, and per token, on samples of the policy.

    The plain Monte Carlo estimate: the mean of log pi(y|x) - log ref(y|x) over y drawn from pi at
    temperature 1 (k1 in Schulman 2020, "Approximating KL divergence"); unbiased, can be negative
    by chance. Arguments hold one list of raw token log-probs per sample.
    """
    ratios = [
        math.fsum(p) - math.fsum(r) for p, r in zip(policy_logps, reference_logps, strict=True)
    ]
    tokens = sum(len(p) for p in policy_logps)
    return estimate(ratios), (math.fsum(ratios) / tokens if tokens else None)


def distinct_n(texts: Sequence[str], n: int = 2) -> float | None:
    """Unique word n-grams over all word n-grams of the texts (Li et al. 2016, 1510.03055)."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None


@dataclass(frozen=True)
class Drift:
    """Raw token log-probs, in nats, of one sample of the policy for each prompt."""

    policy_logps: Sequence[Sequence[float]]
    reference_logps: Sequence[Sequence[float]]


def evaluation_figures(
    rows: Sequence[Mapping[str, Any]], drifts: Mapping[str, Drift | None], *, asked: bool
) -> dict[str, Any]:
    """The figures of an evaluation over all its answers, and over those of each prompt source.

    `rows` are of the answers table, `drifts` by the figure's name and aligned with them. `asked`
    says that the judge was asked about every answer.
    """
    sources: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        sources.setdefault(row["prompt_source"], []).append(index)
    by_source = {
        name: _figures([rows[i] for i in places], _of(drifts, places), asked)
        for name, places in sorted(sources.items())
    }
    return {**_figures(rows, drifts, asked), "by_source": by_source}


def _of(drifts: Mapping[str, Drift | None], places: Sequence[int]) -> dict[str, Drift | None]:
    return {
        name: None
        if drift is None
        else Drift(
            [drift.policy_logps[i] for i in places], [drift.reference_logps[i] for i in places]
        )
        for name, drift in drifts.items()
    }


def _figures(
    rows: Sequence[Mapping[str, Any]], drifts: Mapping[str, Drift | None], asked: bool
) -> dict[str, Any]:
    verdicts = ("score", "p_policy0", "p_previous")
    score = estimate([row["score"] for row in rows if row["score"] is not None])
    return {
        "prompts": len(rows),
        "invalid": sum(asked and all(row[v] is None for v in verdicts) for row in rows),
        "score": None if score is None else asdict(score),
        "win_rate_policy0": _rate(rows, "p_policy0"),
        "win_rate_previous": _rate(rows, "p_previous"),
        "mean_tokens": sum(len(row["token_ids"]) for row in rows) / len(rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "distinct_2": distinct_n([row["text"] for row in rows]),
        **{name: _drift_figures(drift) for name, drift in drifts.items()},
    }


def _rate(rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, Any] | None:
    rate = wilson([row[field] for row in rows if row[field] is not None])
    return None if rate is None else asdict(rate)


def _drift_figures(drift: Drift | None) -> dict[str, Any] | None:
    if drift is None:
        return None
    sequence, token = kl(drift.policy_logps, drift.reference_logps)
    return None if sequence is None else {**asdict(sequence), "per_token": token}
