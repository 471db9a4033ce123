"""Which pairs are compared: drawn, by knockout, or where a label teaches most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.asking.bradley_terry import Posterior
from online_dpo.asking.comparison_schedules import (
    Pair,
    Schedule,
    allocate,
    entropy,
    knockout,
    make_schedule,
    most_comparisons,
    part_of_budget,
)
from online_dpo.config import JudgeConfig
from online_dpo.errors import ConfigError
from online_dpo.judging import Labeller
from online_dpo.pairing import Judged, best_worst, make_pairs
from online_dpo.records import Prompt, Response


def item(texts: Sequence[str], logps: Sequence[float | None] = ()) -> tuple[Prompt, list[Response]]:
    given_logps = [*logps, *[None] * (len(texts) - len(logps))]
    prompt = Prompt("-".join(texts), "set", text="Say something.", token_ids=(1,))
    return prompt, [
        Response(
            f"{prompt.id}:{i}",
            prompt.id,
            text,
            tuple(text.encode()),
            "eos",
            logprobs=None if logp is None else (logp / 2, logp / 2),
        )
        for i, (text, logp) in enumerate(zip(texts, given_logps, strict=True))
    ]


def schedule(name: Any, comparisons: Any, *items: Any, **more: Any) -> Schedule:
    return make_schedule(name, comparisons, items, **{"seed": 1, "round": 1, **more})


def played(following: Schedule, strengths: Sequence[Sequence[float]]) -> list[dict[Pair, float]]:
    """All verdicts that a schedule asks of a judge without error."""
    known: list[dict[Pair, float]] = [{} for _ in strengths]
    while any(wave := following(known)):
        for seen, pairs, values in zip(known, wave, strengths, strict=True):
            for i, j in pairs:
                assert (i, j) not in seen and i < j
                seen[i, j] = 0.5 * (1 + (values[i] > values[j]) - (values[i] < values[j]))
    return known


def test_draws_are_by_seed_and_prefer_distinct_responses() -> None:
    assert schedule("draw", 3, item("aaab"))([{}]) == [[(0, 3), (1, 3), (2, 3)]]
    many = item("abcdefgh")
    draws = {tuple(schedule("draw", 2, many, seed=s)([{}])[0]) for s in range(8)}
    assert len(draws) > 4 and all(len(draw) == 2 for draw in draws)
    (every,) = schedule("draw", "all", many)([{}])
    assert every == list(combinations(range(8), 2))
    assert schedule("draw", "all", many)([{every[0]: None}]) == [[]]


@given(st.permutations(range(9)), st.integers(2, 9))
def test_a_knockout_finds_the_best_and_the_worst(order: list[int], n: int) -> None:
    strengths = [float(place) for place in order[:n]]
    (known,) = played(schedule("knockout", "all", item("abcdefghi"[:n])), [strengths])
    assert len(known) <= most_comparisons("knockout", "all", n)
    best, worst = strengths.index(max(strengths)), strengths.index(min(strengths))
    assert (min(best, worst), max(best, worst)) in known


def test_what_a_knockout_costs() -> None:
    costs = {n: most_comparisons("knockout", "all", n) for n in (1, 2, 3, 4, 5, 8, 16)}
    assert costs == {1: 0, 2: 1, 3: 3, 4: 5, 5: 7, 8: 11, 16: 23}
    (known,) = played(schedule("knockout", "all", item("abcdefgh")), [[1, 2, 3, 4, 5, 6, 7, 8]])
    assert len(known) == 11


def test_a_knockout_waits_for_verdicts_and_goes_on_without_them() -> None:
    assert knockout([3, 0, 2, 1], {}) == [(0, 3), (1, 2)]
    first = {(0, 3): None, (1, 2): 0.0}  # no verdict: 3, the earlier entrant, goes on
    assert knockout([3, 0, 2, 1], first) == [(2, 3), (0, 1)]
    last = {**first, (2, 3): 1.0, (0, 1): 0.0}  # 2 is the best, 0 the worst
    assert knockout([3, 0, 2, 1], last) == [(0, 2)]
    assert knockout([3, 0, 2, 1], {**last, (0, 2): 0.0}) == []
    assert knockout([3, 0, 2, 1], {**last, (0, 1): 1.0}) == []  # 1 is the worst: they have met


def test_doubles_do_not_compete() -> None:
    following = schedule("knockout", "all", item("abba"))
    (wave,) = following([{}])
    assert sorted(wave) == [(0, 1), (0, 3), (1, 2)]  # a tie each with its double, and one match
    assert following([{(0, 1): 1.0, (0, 3): 0.5, (1, 2): 0.5}]) == [[]]


def test_the_posterior_is_laplaces() -> None:
    """Two responses, one soft verdict: the difference d has the prior N(0, 2), so its log posterior
    is -d^2 / 4 + 0.8 log σ(d) + 0.2 log σ(-d), with the slope and the curvature below."""
    belief = Posterior(2, {(0, 1): 0.8})
    d = belief.mode[0] - belief.mode[1]
    won = 1 / (1 + np.exp(-d))
    assert 0.4 < d < 0.41 and -d / 2 + 0.8 - won == pytest.approx(0.0, abs=1e-9)
    variance = 1 / (0.5 + won * (1 - won))
    gain, pair = belief.most_informative([(0, 1)])
    assert pair == (0, 1)
    assert gain == pytest.approx(0.5 * np.log(1 + won * (1 - won) * variance))
    silent = Posterior(2, {(0, 1): None})
    assert silent.mode.tolist() == [0.0, 0.0] and np.array_equal(silent.covariance, np.eye(2))


def test_expecting_a_verdict_is_conditioning_on_it() -> None:
    expected = Posterior(4, {})
    for pair in [(0, 1), (1, 2), (0, 1)]:
        expected.expect(pair)
    x = np.array([[1, -1, 0, 0], [0, 1, -1, 0], [1, -1, 0, 0]], dtype=float)
    precision = np.eye(4) + 0.25 * x.T @ x  # all strengths equal: each verdict weighs 1/4
    assert np.allclose(expected.covariance, np.linalg.inv(precision))


def test_uncertainty_asks_about_what_is_not_known() -> None:
    following = schedule("uncertainty", 3, item("abcd"), item("efgh"))
    first = following([{}, {}])
    assert [len(pairs) for pairs in first] == [1, 1]
    (a, b), (c, d) = first[0][0], first[1][0]
    second = following([{(a, b): 1.0}, {(c, d): 1.0}])
    assert not {a, b} & set(second[0][0]) and not {c, d} & set(second[1][0])
    # A prompt whose order is all but settled leaves its share to one about which nothing is known.
    settled: Mapping[Pair, float | None] = {(i, j): 1.0 for i, j in combinations(range(4), 2)}
    following = schedule("uncertainty", 4, item("abcd"), item("efgh"))
    assert [len(pairs) for pairs in following([{**settled}, {(0, 1): None}])] == [0, 1]


@given(st.integers(0, 30))
def test_a_wave_does_not_ask_twice_about_one_response(seed: int) -> None:
    """Where one prompt takes a whole wave, its pairs are chosen with regard to each other."""
    wave = schedule("uncertainty", 1, item("abcd"), item("jj"), seed=seed)([{}, {}])
    assert len(wave[0]) == 2 and len({*wave[0][0], *wave[0][1]}) == 4 and not wave[1]


@given(st.integers(1, 7), st.integers(0, 3))
def test_uncertainty_spends_its_budget_and_no_more(comparisons: int, seed: int) -> None:
    items = [item("abcde"), item("fghi"), item("jj"), item("kl")]
    known = played(
        schedule("uncertainty", comparisons, *items, seed=seed),
        [[1, 2, 3, 4, 5], [1, 1, 2, 3], [0, 0], [1, 2]],
    )
    assert sum(map(len, known)) == min(4 * comparisons, 10 + 6 + 0 + 1)


def test_entropy_decides_between_prompts() -> None:
    sure, unsure = item("abcd", [-1.0] * 4), item("efgh", [-2.0, -4.0, -3.0, -3.0])
    assert [entropy(*sure), entropy(*unsure)] == [1.0, 3.0]
    assert [len(pairs) for pairs in schedule("entropy", 2, sure, unsure)([{}, {}])] == [1, 3]
    with pytest.raises(ConfigError, match="needs the log-probs"):
        schedule("entropy", 2, item("abc"))


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 6)), min_size=1, max_size=8),
    st.integers(0, 40),
)
def test_seats_are_proportional_and_never_too_many(
    prompts: list[tuple[float, int]], total: int
) -> None:
    weights, capacities = [w for w, _ in prompts], [c for _, c in prompts]
    seats = allocate(weights, capacities, total=total)
    assert sum(seats) == min(total, sum(capacities))
    for i, (weight, room) in enumerate(prompts):
        assert seats[i] <= room
        for j, other in enumerate(weights):
            if seats[i] < room and seats[j]:  # D'Hondt: no seat is worth more to who has it not
                assert weight / (seats[i] + 1) <= other / seats[j]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 60))
def test_parts_of_a_budget_add_up_and_are_proportional(sizes: list[int], total: int) -> None:
    parts = [part_of_budget(sizes, i, total=total) for i in range(len(sizes))]
    assert sum(parts) == total
    for part, size in zip(parts, sizes, strict=True):
        assert abs(part - total * size / sum(sizes)) < 1


def test_parts_of_a_budget_by_hand() -> None:
    """Shards of 4, 4 and 2 prompts and 7 comparisons: 2.8, 2.8 and 1.4."""
    assert [part_of_budget([4, 4, 2], i, total=7) for i in range(3)] == [3, 3, 1]
    assert [part_of_budget([4, 4, 4], i, total=4) for i in range(3)] == [2, 1, 1]


@pytest.mark.parametrize("name", ["uncertainty", "entropy"])
def test_a_budget_may_be_less_than_one_a_prompt(name: str) -> None:
    items = [item("abc", [-1.0] * 3), item("def", [-5.0] * 3), item("gh", [-2.0] * 2)]
    strengths = [[1.0, 2, 3], [1.0, 2, 3], [1.0, 2]]
    known = played(schedule(name, "all", *items, budget=2), strengths)
    assert sum(map(len, known)) == 2
    if name == "entropy":
        assert [len(pairs) for pairs in known] == [0, 2, 0]


def test_the_widest_implicit_margins_are_compared() -> None:
    prompt, responses = item("abcd", [-1.0, -2.0, -3.0, None])
    reference = {r.id: logp for r, logp in zip(responses, (-1.5, -2.0, -9.0, -1.0), strict=True)}
    chosen = schedule("reward_margin", 2, (prompt, responses), reference_logps=reference)([{}])
    assert chosen == [[(1, 2), (0, 2)]]  # log-ratios 0.5, 0 and 6
    draws = {
        tuple(schedule("reward_margin", 1, (prompt, responses), seed=s)([{}])[0]) for s in range(9)
    }
    assert len(draws) > 1 and all(3 not in pair for draw in draws for pair in draw)


@pytest.mark.parametrize(
    ("margins", "order"),
    [
        ("wide", [(1, 2), (0, 2), (0, 1)]),
        ("narrow", [(0, 1), (0, 2), (1, 2)]),
        ("mixed", [(1, 2), (0, 1), (0, 2)]),
    ],
)
def test_margins_are_taken_from_either_end(margins: Any, order: list[Pair]) -> None:
    """Log-ratios 0.5, 0 and 6: margins of 0.5 (0, 1), 5.5 (0, 2) and 6 (1, 2); the fourth answer
    has none, and its pairs come last."""
    prompt, responses = item("abcd", [-1.0, -2.0, -3.0, None])
    reference = {r.id: logp for r, logp in zip(responses, (-1.5, -2.0, -9.0, -1.0), strict=True)}
    for count in range(1, 7):
        (chosen,) = schedule(
            "reward_margin", count, (prompt, responses), reference_logps=reference, margins=margins
        )([{}])
        assert chosen[:3] == order[:count]
        assert all(3 in pair for pair in chosen[3:]) and len(chosen) == count


def test_a_labeller_asks_in_waves(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    shares: list[float] = []
    scripted = {
        "verdicts": [{"first": a, "second": b, "p": 0.0} for a, b in combinations("abcdefgh", 2)]
    }
    labeller = Labeller(
        JudgeConfig(name="scripted", options=scripted, schedule="knockout"),
        base=None,
        ledger_path=tmp_path / "judgments.sqlite",
        seed=0,
        round=1,
        on_event=events.append,
    )
    prompt, responses = item("abcdefgh")
    (labels,) = labeller.label([(prompt, responses)], purpose="label", on_share=shares.append)
    labeller.close()
    found = labels.comparisons or ()
    assert [event["total"] for event in events] == [8, 8, 4, 2]  # in both orders
    places = [(c.first_id, c.second_id) for c in found]
    assert len(found) == 11 and places == sorted(places)
    pairing = make_pairs(
        [Judged(prompt, responses, comparisons=found)],
        best_worst,
        round_number=1,
        seed=0,
        scale=1.0,
        min_margin=0.0,
        max_per_prompt=None,
    )
    (preference,) = pairing.preferences
    assert (preference.chosen_text, preference.rejected_text) == ("h", "a")
