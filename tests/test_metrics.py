"""Figures of a round against hand-worked and independent numbers."""

from __future__ import annotations

from typing import Any

import pytest

from online_dpo.metrics import (
    Drift,
    distinct_n,
    estimate,
    evaluation_figures,
    kl,
    wilson,
    win,
)


def test_wilson_against_the_published_example() -> None:
    # 81 of 263 gives 0.2553 to 0.3662: Newcombe 1998, Table I, method 3.
    rate = wilson([1.0] * 81 + [0.0] * 182)
    assert rate is not None
    assert (rate.low, rate.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_at_the_edges() -> None:
    sure = wilson([1.0] * 10)
    assert sure is not None and sure.value == 1.0 and sure.high > 0.999999 and 0.7 < sure.low < 0.75
    assert wilson([]) is None
    ties = wilson([0.5] * 10)
    assert ties is not None and ties.value == 0.5 and ties.low < 0.5 < ties.high


def test_win_counts_a_tie_as_half() -> None:
    assert [win(2, 1), win(1, 1), win(0, 1)] == [1.0, 0.5, 0.0]


def test_estimate_is_mean_and_standard_error() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found is not None
    assert found.mean == 2.5 and found.stderr == pytest.approx((5 / 3 / 4) ** 0.5)
    assert estimate([]) is None


def test_kl_is_the_mean_log_ratio_per_sequence_and_per_token() -> None:
    policy, reference = [[-1.0, -1.0], [-0.5]], [[-2.0, -1.5], [-0.25]]
    sequence, token = kl(policy, reference)
    assert sequence is not None
    assert sequence.mean == pytest.approx((1.5 - 0.25) / 2)
    assert token == pytest.approx(1.25 / 3)
    with pytest.raises(ValueError):
        kl(policy, reference[:1])


def test_distinct_2_counts_unique_word_pairs() -> None:
    assert distinct_n(["a b c", "a b"]) == pytest.approx(2 / 3)
    assert distinct_n(["a", ""]) is None


def answer(source: str, text: str, *, score: float | None, won: float | None) -> dict[str, Any]:
    return {
        "prompt_source": source, "text": text, "token_ids": text.split(), "score": score,
        "p_policy0": won, "p_previous": None,
        "finish_reason": "length" if text.endswith("and") else "eos",
    }  # fmt: skip


def test_every_figure_of_an_evaluation_is_given_by_source_too() -> None:
    rows = [
        answer("films", "it is fine", score=1.0, won=1.0),
        answer("products", "it is", score=3.0, won=0.0),
        answer("films", "it is fine and", score=None, won=None),
    ]
    drift = Drift([[-1.0], [-2.0, -1.0], [-3.0]], [[-2.0], [-3.0, -3.0], [-3.5]])
    whole = evaluation_figures(rows, {"kl_policy0": drift, "kl_reference": None}, asked=True)
    by_source = whole.pop("by_source")
    assert list(by_source) == ["films", "products"]
    assert set(by_source["films"]) == set(whole)
    films, products = by_source["films"], by_source["products"]
    assert (whole["prompts"], films["prompts"], products["prompts"]) == (3, 2, 1)
    assert (whole["invalid"], films["invalid"], products["invalid"]) == (1, 1, 0)
    assert (films["score"]["mean"], products["score"]["mean"]) == (1.0, 3.0)
    assert (whole["win_rate_policy0"]["value"], films["win_rate_policy0"]["value"]) == (0.5, 1.0)
    assert films["win_rate_previous"] is None and films["kl_reference"] is None
    assert (films["mean_tokens"], products["mean_tokens"]) == (3.5, 2.0)
    assert (films["truncated"], products["truncated"]) == (0.5, 0.0)
    assert (films["distinct_2"], products["distinct_2"]) == (3 / 5, 1.0)
    assert (films["kl_policy0"]["mean"], films["kl_policy0"]["per_token"]) == (0.75, 0.75)
    assert (products["kl_policy0"]["mean"], products["kl_policy0"]["per_token"]) == (3.0, 1.5)
    assert whole["kl_policy0"]["mean"] == pytest.approx(1.5)
