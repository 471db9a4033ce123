"""Preferences from scores and comparisons, and the fate of every response."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.pairing import SELECTORS, Judged, Pairing, check, make_pairs, mix
from online_dpo.records import Comparison, Preference, Prompt, Response, Score

PROMPT = Prompt("prompt", "set", text="Say something.", token_ids=(1, 2))


def responses(*texts: str) -> list[Response]:
    return [
        Response(f"prompt:{i:02d}", "prompt", text, tuple(text.encode()), "eos")
        for i, text in enumerate(texts)
    ]


def pairs_of(item: Judged, selector: str = "best_worst", **settings: object) -> Pairing:
    defaults = {
        "round_number": 1,
        "seed": 0,
        "scale": 1.0,
        "min_margin": 0.0,
        "max_per_prompt": None,
    }
    return make_pairs([item], SELECTORS[selector], **{**defaults, **settings})  # type: ignore[arg-type]


def scored(values: Sequence[float | None], texts: Sequence[str] | None = None) -> Judged:
    given_texts = texts or [f"answer {i}" for i in range(len(values))]
    scores = [Score(v, None if v is not None else "unparsable") for v in values]
    return Judged(PROMPT, responses(*given_texts), scores=scores)


def test_best_worst_takes_the_extremes() -> None:
    pairing = pairs_of(scored([0.5, 2.0, -1.0, 1.0]))
    (preference,) = pairing.preferences
    assert (preference.chosen_text, preference.rejected_text) == ("answer 1", "answer 2")
    assert preference.margin == 3.0
    assert preference.p == pytest.approx(1 / (1 + math.exp(-3.0)))
    assert pairing.fates == {"not_selected": 2, "paired": 2}


def test_all_pairs_widest_first_with_a_cap() -> None:
    pairing = pairs_of(scored([0.0, 1.0, 3.0]), "all", max_per_prompt=2)
    assert [p.margin for p in pairing.preferences] == [3.0, 2.0]


def test_best_random_keeps_the_best_as_chosen() -> None:
    for seed in range(10):
        (preference,) = pairs_of(scored([0.0, 5.0, 1.0]), "best_random", seed=seed).preferences
        assert preference.chosen_text == "answer 1"


def test_ties_identical_and_invalid_never_pair() -> None:
    tied = pairs_of(scored([1.0, 1.0]))
    identical = pairs_of(scored([1.0, 2.0], ["same", "same"]))
    invalid = pairs_of(scored([1.0, None, None]))
    near = pairs_of(scored([1.0, 1.4]), min_margin=0.5)
    assert [p.preferences for p in (tied, identical, invalid, near)] == [(), (), (), ()]
    assert [dict(p.fates) for p in (tied, identical, invalid, near)] == [
        {"tied": 2},
        {"identical": 2},
        {"alone": 1, "invalid": 2},
        {"below_margin": 2},
    ]


def test_comparisons_pair_by_p() -> None:
    a, b, c = (r.id for r in responses("a", "b", "c"))
    comparisons = [
        Comparison("prompt", a, b, 0.2, orders=2),
        Comparison("prompt", a, c, None, "the two orders disagree on the format"),
        Comparison("prompt", b, c, 0.5, orders=2),
    ]
    pairing = pairs_of(Judged(PROMPT, responses("a", "b", "c"), comparisons=comparisons))
    (preference,) = pairing.preferences
    assert (preference.chosen_text, preference.rejected_text) == ("b", "a")
    assert preference.margin == pytest.approx(0.3) and preference.p == pytest.approx(0.8)
    assert pairing.fates == {"paired": 2, "tied": 1}


@given(
    st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, 2.0])), min_size=1, max_size=8),
    st.sampled_from(sorted(SELECTORS)),
    st.integers(0, 1000),
)
def test_every_response_has_one_fate_and_chosen_is_better(
    values: list[float | None], selector: str, seed: int
) -> None:
    pairing = pairs_of(scored(values), selector, seed=seed)
    assert sum(pairing.fates.values()) == len(values)
    check(pairing.preferences)
    scores = {f"prompt:{i:02d}": value for i, value in enumerate(values)}
    for preference in pairing.preferences:
        chosen, rejected = scores[preference.chosen_id], scores[preference.rejected_id]
        assert chosen is not None and rejected is not None and chosen > rejected


def test_equal_extremes_are_not_biased_towards_the_first() -> None:
    firsts = {
        pairs_of(scored([1.0, 1.0, 0.0]), seed=seed).preferences[0].chosen_id for seed in range(20)
    }
    assert firsts == {"prompt:00", "prompt:01"}


def test_a_selector_that_invents_pairs_is_refused() -> None:
    other = pairs_of(scored([0.0, 9.0])).preferences
    with pytest.raises(ValueError, match="not offered"):
        make_pairs(
            [scored([0.0, 1.0])],
            lambda prompt, candidates, rng: [*candidates, *candidates],
            round_number=1,
            seed=0,
            scale=1.0,
            min_margin=0.0,
            max_per_prompt=None,
        )
    assert other


def preference(name: str) -> Preference:
    ids = (1,)
    return Preference(
        name, "p", "s", ids, "a", "b", (2,), (3,), "x", "y", False, False, 1.0, 0.7, name
    )


def test_mixing_reaches_the_stated_shares() -> None:
    new = [preference(f"n{i}") for i in range(50)]
    earlier = [preference(f"e{i}") for i in range(500)]
    offline = [preference(f"o{i}") for i in range(500)]
    mixed = mix(new, earlier, offline, earlier_share=0.2, offline_share=0.3, seed=1)
    kinds = [p.pair_id[0] for p in mixed]
    assert (kinds.count("n"), kinds.count("e"), kinds.count("o")) == (50, 20, 30)
    assert len({p.pair_id for p in mixed}) == 100
