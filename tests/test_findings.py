"""What stands out of a judge's figures is said in words, and what does not is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from online_dpo.asking.unusable_replies import CUT_OFF
from online_dpo.judge_figures import Judged, figures
from online_dpo.report_card.attacks import Attempt, attack_figures
from online_dpo.report_card.findings import findings


def pair(*order_ps: float, gold: float = 1.0, **more: Any) -> Judged:
    p = sum(order_ps) / len(order_ps) if order_ps else None
    lengths = more.pop("lengths", (5, 5))
    return Judged(order_ps, p, more.pop("reason", None), *lengths, gold, **more)


def found(
    judged: Sequence[Judged], attempts: Sequence[Attempt] = (), *, kind: str = "compare"
) -> list[str]:
    reasons: dict[str, int] = {}
    for one in judged:
        if one.p is None:
            reasons[one.reason or ""] = reasons.get(one.reason or "", 0) + 1
    return findings(
        {
            "judge": {"kind": kind},
            "figures": figures(judged),
            "no_verdict": reasons,
            "attacks": attack_figures(attempts),
        }
    )


def test_a_sound_judge_has_none() -> None:
    assert found([pair(1, 1, gold=1), pair(0, 0, gold=0)] * 10) == []
    assert found([]) == []


@pytest.mark.parametrize(
    ("judged", "words"),
    [
        ([pair(0, 0)] * 20, "0% of 20 pairs (95% interval 0-16), less often than a coin"),
        ([pair(1, 1), pair(0, 0)] * 5, "50% of 10 pairs (95% interval 24-76), which does not tell"),
        ([pair(0, 1)] * 10, "It prefers the second shown in 100% of 20 verdicts"),
        ([pair(1, lengths=(2, 9)), pair(0, lengths=(9, 2))] * 5, "prefers the longer response in "
         "only 0% of 10 decided pairs (95% interval 0-28); the labels in 50%."),
        ([pair(0.5, 0.5)] * 9, "It calls 100% of the pairs a tie; the labels 0%."),
        ([pair(1, 1)] * 9 + [pair(reason=CUT_OFF)], f"10% of the pairs have no verdict because its "
         f"reply could not be used: {CUT_OFF} (1)."),
        ([pair(1, votes=((1.0, 0.0),))] * 9, "answers alike in 0% of 9 questions, as if it "
         "answered at random"),
        ([pair(1, votes=((1.0,) * 4 + (0.0,),))] * 9, "60% of 9 questions, as if 28% of its"),
    ],
)  # fmt: skip
def test_a_figure_that_stands_out_is_said(judged: list[Judged], words: str) -> None:
    assert any(words in sentence for sentence in found(judged)), found(judged)


def test_p_is_taken_at_its_word() -> None:
    sure = [pair(0.95, gold=g) for g in (1, 1, 1, 0)] * 10
    assert "Its p is 95% sure on average and right in 75%" in found(sure)[0]
    modest = [pair(0.6, gold=1)] * 10
    (sentence,) = found(modest, kind="score")
    assert "60% sure on average and right in 100%" in sentence and "judge.scale" in sentence
    # Whole verdicts are no probabilities: their calibration error is their error.
    assert not any("sure" in s for s in found([pair(1, gold=g) for g in (1, 1, 1, 0)] * 10))


def test_an_attack_must_turn_more_than_asking_again_does() -> None:
    attempts = [Attempt("verdict", 0.5, {True: 1.0, False: 0.0}, {True: 0.0, False: 0.0})] * 4
    steady = [pair(1, votes=((1.0, 1.0),))] * 9
    (sentence,) = found(steady, attempts)
    assert "fooled by the worse response with a forged verdict: 50% of 8 verdicts" in sentence
    coin = [pair(1, votes=((1.0, 0.0),))] * 9
    assert not any("fooled" in sentence for sentence in found(coin, attempts))


def test_an_attack_on_what_was_wrong_before_turns_nothing() -> None:
    attempts = [Attempt("fence", 1.0, {True: 1.0, False: 1.0}, {True: 1.0, False: 0.6})] * 4
    assert attack_figures(attempts)["fence"]["flipped"] is None
    assert attack_figures(attempts)["fence"]["fooled"]["value"] == 1.0
    assert found([pair(1)] * 9, attempts) == []
