"""A judge's figures on what a round of a campaign has asked it; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, NamedTuple

from online_dpo.asking.members import verdict_of_scores
from online_dpo.asking.unusable_replies import is_unusable
from online_dpo.asking.verdicts import IDENTICAL, Kind
from online_dpo.judge_figures import Judged, figures, preferred
from online_dpo.metrics import wilson
from online_dpo.records import Comparison, Score
from online_dpo.report_card.answers import Answered, judged
from online_dpo.report_card.comparisons import Labelled

Row = Mapping[str, Any]


class Shown(NamedTuple):
    """What a judge sees of a response, with its number of tokens."""

    text: str
    finish_reason: str
    tokens: int


def label_figures(
    labels: Sequence[Row],
    samples: Mapping[str, Shown],
    *,
    kind: Kind,
    scale: float,
    is_swapped: Callable[[Row], bool | None],
) -> dict[str, Any]:
    """`labels`: the figures of docs/metrics.md over rows of the labels table; `verdicts` are what
    was asked for, `unusable` why some could not be read. `samples` are the responses by id.

    Where the judge scores, they are those of all pairs of a prompt's scored responses, with p by
    sigmoid(difference / `scale`), and the shares without a score are shares of the scores.
    `is_swapped` tells of a comparison in one order whether it was shown swapped, None for unknown.
    """
    reasons = [r["reason"] for r in labels if r["p"] is None and r["score"] is None]
    unusable = Counter(reason for reason in reasons if is_unusable(reason))
    if kind == "compare":
        verdicts = sum(r["reason"] != IDENTICAL for r in labels)
        found = figures([_comparison(r, samples, is_swapped) for r in labels])
    else:
        verdicts = len(labels)
        found = figures(_score_pairs(labels, samples, scale))
        if verdicts:
            found["invalid"] = unusable.total() / verdicts
            found["abstained"] = (len(reasons) - unusable.total()) / verdicts
    return {"verdicts": verdicts, "unusable": dict(sorted(unusable.items())), "labels": found}


def gold_figures(gold: Sequence[Labelled], said: Sequence[Answered]) -> dict[str, Any] | None:
    """The figures of docs/metrics.md over labelled comparisons; None without any."""
    if not gold:
        return None
    return figures([judged(row, answer) for row, answer in zip(gold, said, strict=True)])


def win_rate(comparisons: Iterable[Comparison]) -> dict[str, Any] | None:
    """The rate of verdicts for the first response, ties half; those without a verdict left out."""
    rate = wilson([0.5 + preferred(c.p) / 2 for c in comparisons if c.p is not None])
    return None if rate is None else asdict(rate)


def _comparison(
    row: Row, samples: Mapping[str, Shown], is_swapped: Callable[[Row], bool | None]
) -> Judged:
    order_ps = tuple(row["order_ps"])
    return Judged(
        order_ps,
        row["p"],
        row["reason"],
        samples[row["first_id"]].tokens,
        samples[row["second_id"]].tokens,
        swapped=is_swapped(row) if len(order_ps) == 1 else None,
        votes=_by_order(row),
        prompt_id=row["prompt_id"],
        first_id=row["first_id"],
        second_id=row["second_id"],
    )


def _by_order(row: Row) -> tuple[tuple[float | None, ...], ...]:
    """The votes of each order, where they are several."""
    votes = tuple(row["vote_ps"])
    size = len(votes) // (row["orders"] or 1)
    return tuple(votes[start : start + size] for start in range(0, len(votes), size or 1))


def _score_pairs(labels: Sequence[Row], samples: Mapping[str, Shown], scale: float) -> list[Judged]:
    """All pairs of a prompt's scored responses; without ids, for scores cannot go in a circle."""
    scored: dict[str, list[Row]] = {}
    for row in labels:
        if row["score"] is not None:
            scored.setdefault(row["prompt_id"], []).append(row)
    return [
        _scored_pair(first, second, samples, scale)
        for rows in scored.values()
        for first, second in combinations(rows, 2)
    ]


def _scored_pair(first: Row, second: Row, samples: Mapping[str, Shown], scale: float) -> Judged:
    one, other = samples[first["first_id"]], samples[second["first_id"]]
    same = one[:2] == other[:2]
    p = verdict_of_scores(Score(first["score"]), Score(second["score"]), scale=scale).p
    return Judged((), p, IDENTICAL if same else None, one.tokens, other.tokens)
