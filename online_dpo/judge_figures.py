"""How good a judge is, in figures over the pairs that it has judged; pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from online_dpo.annotation.agreement import cohen_kappa
from online_dpo.asking.unusable_replies import is_unusable
from online_dpo.asking.verdicts import IDENTICAL
from online_dpo.metrics import wilson

NUM_BINS = 5
"""Of equal width, over the confidence from 0.5 to 1."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One pair as it was judged. Every p is the probability that its *first* response is better.

    `order_ps` has one p for each order asked, the order as given first; it is empty where there is
    no verdict, where the judge scores, and for identical responses, about which nothing is asked.
    Where there is one order, `swapped` says whether the second response was shown first, None that
    this is unknown. `p` is the combined verdict, `reason` says why there is none. Lengths are in
    characters or tokens, the same for all. `gold` is the p of a label. `votes` has, for each order
    asked, the p of every vote, None for one without a verdict. The ids join the pairs of a prompt.
    """

    order_ps: tuple[float, ...]
    p: float | None
    reason: str | None
    first_length: int
    second_length: int
    gold: float | None = None
    swapped: bool | None = None
    votes: tuple[tuple[float | None, ...], ...] = ()
    prompt_id: str = ""
    first_id: str = ""
    second_id: str = ""


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Every figure as plain JSON types; docs/metrics.md has each one's formula.

    A rate is `value` with Wilson's 95% interval `low` to `high` over `count` observations; shares
    are floats. What cannot be had of these pairs is None: nothing to observe, no labels, one order.
    Identical responses, about which no judge was asked, are counted and otherwise left out.
    """
    asked = [pair for pair in judged if pair.reason != IDENTICAL]
    return {
        "pairs": len(judged),
        "identical": len(judged) - len(asked),
        "labelled": sum(pair.gold is not None for pair in asked),
        "accuracy": accuracy((pair.p, pair.gold) for pair in asked),
        "accuracy_by_order": _accuracy_by_order(asked),
        "agreement": agreement(asked),
        "order_conflicts": order_conflicts(asked),
        "kappa": kappa([(pair.p, pair.gold) for pair in asked]),
        "kappa_orders": kappa([(p, q) for p, q in _both_orders(asked)]),
        "labels_tied": _share([p for p in asked if p.gold is not None], lambda p: p.gold == 0.5),
        "ties": _share(asked, lambda pair: pair.p == 0.5),
        "abstained": _share(asked, lambda p: p.p is None and not is_unusable(p.reason)),
        "invalid": _share(asked, lambda p: p.p is None and is_unusable(p.reason)),
        "prefers_longer": prefers_longer(asked, [pair.p for pair in asked]),
        "labels_prefer_longer": prefers_longer(asked, [pair.gold for pair in asked]),
        "prefers_first": prefers_first(asked),
        "calibration": calibration([(pair.p, pair.gold) for pair in asked]),
        "repeat_stability": repeat_stability(asked),
        "intransitive": intransitive(asked),
    }


def preferred(p: float) -> int:
    """1 for the first response, -1 for the second, 0 for neither."""
    return (p > 0.5) - (p < 0.5)


def accuracy(verdicts: Iterable[tuple[float | None, float | None]]) -> dict[str, Any] | None:
    """The rate of verdicts (p, gold) on the label's side, ties half; labels of a tie left out."""
    return _rate(
        [
            0.5 if p == 0.5 else float(preferred(p) == preferred(gold))
            for p, gold in verdicts
            if p is not None and gold is not None and gold != 0.5
        ]
    )


def agreement(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """The rate of pairs asked in both orders in which both come to the same: first, second, tie."""
    return _rate([float(preferred(p) == preferred(q)) for p, q in _both_orders(judged)])


def order_conflicts(judged: Sequence[Judged]) -> float | None:
    """The share of pairs asked in both orders where one prefers the first, the other the second."""
    both = _both_orders(judged)
    return sum(preferred(p) * preferred(q) == -1 for p, q in both) / len(both) if both else None


def kappa(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Cohen's kappa (1960), unweighted, over first, second and tie, of the pairs that have both.

    None without any, and where chance alone would agree always.
    """
    sides = [
        (float(preferred(p)), float(preferred(q)))
        for p, q in pairs
        if p is not None and q is not None
    ]
    return cohen_kappa(sides) if sides else None


def prefers_longer(judged: Sequence[Judged], ps: Sequence[float | None]) -> dict[str, Any] | None:
    """The rate of decided pairs of unequal length that `ps` gives to the longer response."""
    return _rate(
        [
            float((pair.first_length > pair.second_length) == (p > 0.5))
            for pair, p in zip(judged, ps, strict=True)
            if p is not None and p != 0.5 and pair.first_length != pair.second_length
        ]
    )


def prefers_first(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """The rate of decided verdicts, order by order, for the response that was shown first."""
    return _rate([float((p > 0.5) != swapped) for p, swapped in _shown(judged) if p != 0.5])


def calibration(
    pairs: Sequence[tuple[float | None, float | None]],
) -> dict[str, Any] | None:
    """Whether p means what it says, over the pairs (p, gold) that have both.

    `brier`: the mean of (p - gold)² (Brier 1950). `ece`: with confidence c = max(p, 1 - p) and
    correctness a = gold where p >= 0.5, else 1 - gold, the mean over pairs of |mean a - mean c| in
    the pair's bin (Guo et al. 2017, 1706.04599, eq. 3, here over confidences from 0.5 to 1), a
    tie of the judge counting half. Neither changes when a pair is turned round.
    """
    both = [(p, gold) for p, gold in pairs if p is not None and gold is not None]
    if not both:
        return None
    bins: list[list[tuple[float, float]]] = [[] for _ in range(NUM_BINS)]
    for p, gold in both:
        confidence = max(p, 1.0 - p)
        right = 0.5 if p == 0.5 else gold if p > 0.5 else 1.0 - gold
        place = int(confidence * 2 * NUM_BINS - NUM_BINS)
        bins[min(place, NUM_BINS - 1)].append((confidence, right))
    rows = [_reliability(index, members) for index, members in enumerate(bins) if members]
    gaps = math.fsum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    brier = math.fsum((p - gold) ** 2 for p, gold in both) / len(both)
    return {
        "brier": brier,
        "ece": gaps / len(both),
        "num_bins": NUM_BINS,
        "count": len(both),
        "reliability": rows,
    }


def repeat_stability(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """How alike the votes on one question are: `value` is the mean, over the `count` questions with
    two votes or more, of the share of pairs of votes that come to the same (first, second, tie or
    no verdict). A judge that flips a share f of its answers has 1 - 2f(1 - f).
    """
    shares = [_alike(votes) for pair in judged for votes in pair.votes if len(votes) > 1]
    return {"value": math.fsum(shares) / len(shares), "count": len(shares)} if shares else None


def intransitive(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """The share of triples of a prompt's responses, each pair of them decided, that go in a circle.

    Kendall and Babington Smith (1940), "On the method of paired comparisons": circular triads.
    A judge that tosses a coin has a quarter.
    """
    wins: dict[str, dict[tuple[str, str], bool]] = defaultdict(dict)
    for pair in judged:
        if pair.prompt_id and pair.p is not None and pair.p != 0.5:
            wins[pair.prompt_id][pair.first_id, pair.second_id] = pair.p > 0.5
            wins[pair.prompt_id][pair.second_id, pair.first_id] = pair.p < 0.5
    circular = [
        beats[a, b] == beats[b, c] == beats[c, a]
        for beats in wins.values()
        for a, b, c in combinations(sorted({first for first, _ in beats}), 3)
        if {(a, b), (b, c), (c, a)} <= beats.keys()
    ]
    return {"value": sum(circular) / len(circular), "count": len(circular)} if circular else None


def _both_orders(judged: Sequence[Judged]) -> list[tuple[float, float]]:
    return [(pair.order_ps[0], pair.order_ps[1]) for pair in judged if len(pair.order_ps) == 2]


def _shown(judged: Sequence[Judged]) -> list[tuple[float, bool]]:
    """Each order's p with whether it was shown swapped, where that is known."""
    shown = []
    for pair in judged:
        if len(pair.order_ps) == 2:
            shown += [(pair.order_ps[0], False), (pair.order_ps[1], True)]
        elif len(pair.order_ps) == 1 and pair.swapped is not None:
            shown.append((pair.order_ps[0], pair.swapped))
    return shown


def _accuracy_by_order(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """The accuracy in each order, and by where the better response stood; None without orders."""
    shown = [(p, pair.gold, swapped) for pair in judged for p, swapped in _shown([pair])]
    stood_first = [
        (p, gold, (gold > 0.5) != swapped) for p, gold, swapped in shown if gold is not None
    ]
    if not shown:
        return None
    return {
        "as_given": accuracy((p, gold) for p, gold, swapped in shown if not swapped),
        "swapped": accuracy((p, gold) for p, gold, swapped in shown if swapped),
        "better_shown_first": accuracy((p, gold) for p, gold, first in stood_first if first),
        "better_shown_second": accuracy((p, gold) for p, gold, first in stood_first if not first),
    }


def _reliability(index: int, members: Sequence[tuple[float, float]]) -> dict[str, Any]:
    count = len(members)
    return {
        "low": 0.5 + index / (2 * NUM_BINS),
        "high": 0.5 + (index + 1) / (2 * NUM_BINS),
        "count": count,
        "confidence": math.fsum(confidence for confidence, _ in members) / count,
        "accuracy": math.fsum(right for _, right in members) / count,
    }


def _alike(votes: Sequence[float | None]) -> float:
    sides = [None if p is None else preferred(p) for p in votes]
    pairs = list(combinations(sides, 2))
    return sum(a == b for a, b in pairs) / len(pairs)


def _share(judged: Sequence[Judged], holds: Callable[[Judged], bool]) -> float | None:
    return sum(map(holds, judged)) / len(judged) if judged else None


def _rate(outcomes: Sequence[float]) -> dict[str, Any] | None:
    rate = wilson(outcomes)
    return None if rate is None else asdict(rate)
