"""A judge's figures on what a round of a campaign has asked it; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

from online_dpo.asking.members import verdict_of_scores
from online_dpo.asking.unusable_replies import is_unusable
from online_dpo.asking.verdicts import IDENTICAL, Kind
from online_dpo.judge_figures import Judged, figures, preferred
from online_dpo.metrics import wilson
from online_dpo.records import Comparison, Prompt, Response, Score, to_dict

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


@dataclass(frozen=True, slots=True)
class Asked:
    """A pair that a round asks about beside its labels, and the judge's word on it.

    `swapped` says how it was shown, where it was in one order.
    """

    part: Literal["gold", "constant"]
    prompt: Prompt
    first: Response
    second: Response
    said: Comparison
    swapped: bool | None
    gold: float | None = None


def gold_figures(asked: Sequence[Asked]) -> dict[str, Any] | None:
    """The figures of docs/metrics.md over labelled comparisons, lengths in characters."""
    if not asked:
        return None
    return figures(
        [
            Judged(
                a.said.order_ps,
                a.said.p,
                a.said.reason,
                len(a.first.text),
                len(a.second.text),
                gold=a.gold,
                swapped=a.swapped,
            )
            for a in asked
        ]
    )


def win_rate(comparisons: Iterable[Comparison]) -> dict[str, Any] | None:
    """The rate of verdicts for the first response, ties half; those without a verdict left out."""
    rate = wilson([0.5 + preferred(c.p) / 2 for c in comparisons if c.p is not None])
    return None if rate is None else asdict(rate)


def comparison_of_scores(
    pair: tuple[Prompt, Response, Response], one: Score, other: Score, *, scale: float
) -> Comparison:
    """The scores of two responses as a comparison of them, in no order."""
    prompt, first, second = pair
    verdict = verdict_of_scores(one, other, scale=scale)
    raws = () if verdict.raw is None else (verdict.raw,)
    return Comparison(prompt.id, first.id, second.id, verdict.p, verdict.reason, 0, raws)


def asked_row(asked: Asked) -> dict[str, Any]:
    """A row of the checks table."""
    return {
        "part": asked.part,
        "prompt_text": asked.prompt.content,
        "first_text": asked.first.text,
        "second_text": asked.second.text,
        "gold": asked.gold,
        **to_dict(asked.said),
    }


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
        prompt_id=row["prompt_id"],
        first_id=row["first_id"],
        second_id=row["second_id"],
    )


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
