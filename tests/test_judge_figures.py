"""Figures of a judge against hand-worked numbers and slow formulas of their definitions."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.llm_replies import REFUSED
from judges.llm_soft import LITTLE_MASS
from online_dpo.asking.unusable_replies import CUT_OFF, EMPTY, NO_VERDICT, TOO_LONG, is_unusable
from online_dpo.asking.verdicts import IDENTICAL
from online_dpo.asking.verdicts import NO_VERDICT as ABSTAINED
from online_dpo.judge_figures import Judged, figures, kappa
from online_dpo.metrics import wilson


def judged(
    *order_ps: float, gold: float | None = None, lengths: tuple[int, int] = (1, 1), **more: Any
) -> Judged:
    """A pair with a verdict: its p is the mean over the orders."""
    return Judged(order_ps, math.fsum(order_ps) / len(order_ps), None, *lengths, gold, **more)


def without(reason: str, gold: float | None = None) -> Judged:
    return Judged((), None, reason, 1, 1, gold)


def test_accuracy_is_of_the_verdicts_on_the_labels_side_and_ties_are_half() -> None:
    found = figures(
        [
            judged(1, 1, gold=1),
            judged(0.9, 0.6, gold=0),
            judged(1, 0, gold=1),  # a tie
            judged(0, 0, gold=0.5),  # the label is none to be right about
            judged(0, 0),
            without(NO_VERDICT, gold=1),
        ]
    )
    assert found["pairs"] == 6 and found["labelled"] == 5
    assert found["accuracy"]["value"] == 0.5 and found["accuracy"]["count"] == 3
    rate = wilson([1, 0, 0.5])
    assert rate is not None
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == (rate.low, rate.high)


def test_each_order_has_an_accuracy_of_its_own() -> None:
    always_first = [judged(1, 0, gold=gold) for gold in (1, 1, 1, 0)]
    by_order = figures(always_first)["accuracy_by_order"]
    assert by_order["as_given"]["value"] == 0.75
    assert by_order["swapped"]["value"] == 0.25
    assert by_order["better_shown_first"]["value"] == 1.0
    assert by_order["better_shown_first"]["count"] == 4
    assert by_order["better_shown_second"]["value"] == 0.0


def test_orders_that_differ_are_a_conflict_only_where_they_are_opposites() -> None:
    found = figures([judged(1, 1), judged(1, 0.5), judged(1, 0), judged(0.5, 0.5)])
    assert found["agreement"]["value"] == 0.5
    assert found["order_conflicts"] == 0.25


def test_the_first_shown_is_the_second_response_where_the_order_is_swapped() -> None:
    assert figures([judged(1, 0), judged(0.9, 0.2)])["prefers_first"]["value"] == 1.0
    assert figures([judged(1, 1)])["prefers_first"] == figures([judged(0, 0)])["prefers_first"]
    assert figures([judged(1, 1)])["prefers_first"]["value"] == 0.5
    one = [judged(1, swapped=False), judged(0, swapped=True), judged(1, swapped=True), judged(1)]
    assert figures(one)["prefers_first"]["count"] == 3
    assert figures(one)["prefers_first"]["value"] == pytest.approx(2 / 3)
    assert figures(one)["agreement"] is None and figures(one)["order_conflicts"] is None


def test_shares_are_of_the_pairs_asked_and_abstaining_is_not_failing() -> None:
    pairs = [
        judged(1, 1),
        judged(1, 0),
        judged(0.5, 0.5),
        without(NO_VERDICT),
        without(f"{EMPTY} (stop)"),
        without(ABSTAINED),
        without("no words"),
        without(REFUSED),
        Judged((), 0.5, IDENTICAL, 1, 1),
    ]
    found = figures(pairs)
    assert (found["pairs"], found["identical"]) == (9, 1)
    assert (found["ties"], found["invalid"], found["abstained"]) == (2 / 8, 2 / 8, 3 / 8)


@pytest.mark.parametrize("reason", [NO_VERDICT, CUT_OFF, TOO_LONG, "empty reply (length)"])
def test_a_reply_that_cannot_be_used_is_told_by_its_reason(reason: str) -> None:
    assert is_unusable(reason)


@pytest.mark.parametrize("reason", [None, ABSTAINED, REFUSED, LITTLE_MASS, "my own reason"])
def test_other_reasons_are_abstentions(reason: str | None) -> None:
    assert not is_unusable(reason)


def test_the_longer_is_preferred_among_decided_pairs_of_unequal_length() -> None:
    found = figures(
        [
            judged(1, 1, gold=0, lengths=(9, 2)),
            judged(0, 0, gold=1, lengths=(2, 9)),
            judged(1, 1, gold=1, lengths=(2, 9)),
            judged(1, 1, gold=1, lengths=(5, 5)),
            judged(1, 0, gold=1, lengths=(5, 2)),
        ]
    )
    assert found["prefers_longer"]["value"] == pytest.approx(2 / 3)
    assert found["prefers_longer"]["count"] == 3
    assert found["labels_prefer_longer"]["value"] == 0.25


def test_kappa_by_hand() -> None:
    # The yes/no example of Cohen's kappa: 20 and 15 agreed, 5 and 10 not; (0.7 - 0.5) / (1 - 0.5).
    pairs = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15
    assert kappa(pairs) == pytest.approx(0.4)
    assert kappa([]) is None and kappa([(1.0, 1.0)]) is None
    assert kappa([(None, 1.0), (0.7, 1.0), (0.3, 0.0)]) == 1.0


def slow_kappa(pairs: Sequence[tuple[float, float]]) -> float:
    """From the confusion table, as scikit-learn does it: 1 - disagreement over that of chance."""
    sides = [tuple(0 if p < 0.5 else 1 if p == 0.5 else 2 for p in pair) for pair in pairs]
    table = [[sum(s == (i, j) for s in sides) for j in range(3)] for i in range(3)]
    rows, columns = [sum(row) for row in table], [sum(c) for c in zip(*table, strict=True)]
    off = [(i, j) for i, j in product(range(3), repeat=2) if i != j]
    chance = sum(rows[i] * columns[j] for i, j in off) / len(pairs)
    return 1.0 - sum(table[i][j] for i, j in off) / chance


def test_kappa_against_a_confusion_table() -> None:
    draw = random.Random(1)
    for _ in range(50):
        pairs = [(draw.choice([0, 0.4, 0.5, 1]), draw.choice([0, 0.5, 1])) for _ in range(30)]
        assert kappa(pairs) == pytest.approx(slow_kappa(pairs))


def test_calibration_by_hand() -> None:
    found = figures(
        [judged(0.9, gold=1), judged(0.1, gold=1), judged(0.7, gold=1), judged(0.5, gold=0)]
    )["calibration"]
    # (0.1² + 0.9² + 0.3² + 0.5²) / 4
    assert found["brier"] == pytest.approx(0.29)
    assert [(r["low"], r["count"], r["accuracy"]) for r in found["reliability"]] == [
        (0.5, 1, 0.5),
        (0.7, 1, 1.0),
        (0.9, 2, 0.5),
    ]
    # The gaps: 0 once, 0.3 once, 0.4 twice.
    assert found["ece"] == pytest.approx((0.3 + 2 * 0.4) / 4)


P = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.6, 0.8, 0.9, 1.0])
PAIRS = st.lists(
    st.builds(
        lambda p, q, gold, lengths, none: (
            without(NO_VERDICT, gold) if none else judged(p, q, gold=gold, lengths=lengths)
        ),
        P,
        P,
        st.sampled_from([0.0, 0.5, 1.0]),
        st.tuples(st.integers(0, 3), st.integers(0, 3)),
        st.booleans(),
    )
)


def turned(pair: Judged) -> Judged:
    """The same pair with first and second exchanged, its orders with them."""
    return Judged(
        tuple(1.0 - p for p in reversed(pair.order_ps)),
        None if pair.p is None else 1.0 - pair.p,
        pair.reason,
        pair.second_length,
        pair.first_length,
        None if pair.gold is None else 1.0 - pair.gold,
    )


@given(PAIRS)
def test_no_figure_depends_on_which_response_is_called_the_first(pairs: list[Judged]) -> None:
    found, other = figures(pairs), figures([turned(pair) for pair in pairs])
    for each in (found, other):
        if each["accuracy_by_order"] is not None:
            del each["accuracy_by_order"]["as_given"], each["accuracy_by_order"]["swapped"]
    assert json.loads(json.dumps(found), parse_float=rounded) == json.loads(
        json.dumps(other), parse_float=rounded
    )


def rounded(number: str) -> float:
    return round(float(number), 9)


@pytest.mark.parametrize("flips", [0.0, 0.2, 0.5])
def test_stability_of_a_judge_that_flips_is_known(flips: float) -> None:
    draw = random.Random(7)
    pairs = [
        judged(1, 1, votes=tuple(tuple(float(draw.random() >= flips) for _ in "abc") for _ in "12"))
        for _ in range(3000)
    ]
    found = figures(pairs)["repeat_stability"]
    assert found["count"] == 6000
    assert found["value"] == pytest.approx(1 - 2 * flips * (1 - flips), abs=0.02)


def test_a_vote_without_a_verdict_is_unlike_one_with() -> None:
    found = figures([judged(1, votes=((1.0, None),)), judged(1, votes=((None, None), (0.9,)))])
    assert found["repeat_stability"] == {"value": 0.5, "count": 2}
    assert figures([judged(1, 1)])["repeat_stability"] is None


def test_circles_among_three_responses_are_counted_by_prompt() -> None:
    def three(prompt: str, ab: float, bc: float, ac: float) -> list[Judged]:
        named = zip((ab, bc, ac), ("ab", "bc", "ac"), strict=True)
        return [judged(p, prompt_id=prompt, first_id=ids[0], second_id=ids[1]) for p, ids in named]

    circle, line, tied = three("x", 1, 1, 0), three("y", 1, 1, 1), three("z", 1, 0.5, 0)
    assert figures([*circle, *line, *tied])["intransitive"] == {"value": 0.5, "count": 2}
    assert figures(three("x", 0, 0, 1))["intransitive"] == {"value": 1.0, "count": 1}
    assert figures(circle[:2])["intransitive"] is None


def test_a_coin_goes_in_circles_in_a_quarter_of_triples() -> None:
    draw = random.Random(3)
    pairs = [
        judged(float(draw.random() < 0.5), prompt_id=str(k), first_id=a, second_id=b)
        for k in range(200)
        for a, b in combinations("abcde", 2)
    ]
    found = figures(pairs)["intransitive"]
    assert found["count"] == 200 * 10
    assert found["value"] == pytest.approx(0.25, abs=0.03)


def test_of_scores_there_are_no_orders_and_of_nothing_no_figures() -> None:
    scored = figures([Judged((), 0.8, None, 4, 2, 1.0), Judged((), 0.5, None, 4, 2, 1.0)])
    assert scored["accuracy"]["value"] == 0.75
    orders = ("accuracy_by_order", "agreement", "order_conflicts", "kappa_orders", "prefers_first")
    assert all(scored[name] is None for name in orders)
    nothing = figures([])
    assert nothing.pop("pairs") == nothing.pop("identical") == nothing.pop("labelled") == 0
    assert not any(value is not None for value in nothing.values())
