"""What a round draws, starts from and promotes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.config import Config
from online_dpo.records import ModelRef, derive_seed
from online_dpo.retention import KeptRound, deletable
from online_dpo.schedule import PastRound, PromptPool, draw_prompts, plan_round


def config(**sections: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "prompts": {"train": [{"path": "d"}], "holdout": 1},
            "judge": {"name": "heuristic"},
            **sections,
        }
    )


def past(number: int, *, promoted: bool = False, optimizer_step: int = 0) -> PastRound:
    return PastRound(
        round=number,
        prompt_ids=(),
        policy=ModelRef(f"rounds/{number:03d}/policy", f"hash{number}"),
        promoted=promoted,
        optimizer=ModelRef(f"rounds/{number:03d}/optimizer", f"state{number}"),
        optimizer_step=optimizer_step,
        manifest_sha256=f"manifest{number}",
    )


POOL = PromptPool({"a": ["p1", "p2", "p3"]}, {"a": 1.0}, "table")


@given(
    size=st.integers(1, 60),
    per_round=st.integers(1, 60),
    rounds=st.integers(1, 8),
    seed=st.integers(),
)
def test_no_prompt_repeats_before_the_set_is_used_up(
    size: int, per_round: int, rounds: int, seed: int
) -> None:
    pool = PromptPool({"a": [f"p{i}" for i in range(size)]}, {"a": 1.0}, "h")
    history: list[tuple[str, ...]] = []
    for _ in range(rounds):
        drawn = draw_prompts(pool, history, num_prompts=per_round, seed=seed)
        assert len(drawn) == len(set(drawn)) == min(per_round, size)
        history.append(drawn)
        uses = Counter(p for ids in history for p in ids)
        counts = [uses[p] for p in pool.ids["a"]]
        assert max(counts) - min(counts) <= 1


def test_sources_are_drawn_by_weight_over_the_rounds() -> None:
    pool = PromptPool(
        {"a": [f"a{i}" for i in range(100)], "b": [f"b{i}" for i in range(100)]},
        {"a": 3.0, "b": 1.0},
        "h",
    )
    history: list[tuple[str, ...]] = []
    for _ in range(5):
        history.append(draw_prompts(pool, history, num_prompts=10, seed=0))
    taken = Counter(p[0] for ids in history for p in ids)
    assert abs(taken["a"] - 37.5) <= 1 and sum(taken.values()) == 50


def test_other_seeds_draw_other_prompts() -> None:
    pool = PromptPool({"a": [f"p{i}" for i in range(50)]}, {"a": 1.0}, "h")
    drawn = {draw_prompts(pool, [], num_prompts=5, seed=seed) for seed in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize(
    ("promote", "expected"),
    [("every_round", [0, 1, 2, 3]), ("never", [0, 0, 0, 0]), ({"every": 2}, [0, 0, 2, 2])],
)
def test_the_reference_of_each_round(promote: object, expected: list[int]) -> None:
    from online_dpo.schedule import is_promoted

    settings = config(reference={"promote": promote}, campaign={"rounds": 4})
    history = [past(0, promoted=True)]
    references = []
    for number in range(1, 5):
        plan = plan_round(settings, history, POOL)
        references.append(plan.reference_round)
        assert plan.policy.path == f"rounds/{number - 1:03d}/policy"
        assert plan.previous_manifest_sha256 == f"manifest{number - 1}"
        history.append(past(number, promoted=is_promoted(settings, number)[0]))
    assert references == expected


def test_the_optimizer_travels_only_where_it_is_carried() -> None:
    history = [past(0, promoted=True, optimizer_step=7)]
    reset = plan_round(config(), history, POOL)
    carried = plan_round(config(train={"optimizer": "carry"}), history, POOL)
    assert (reset.optimizer, reset.optimizer_step) == (None, 0)
    assert (carried.optimizer, carried.optimizer_step) == (history[0].optimizer, 7)


def test_evaluations_fall_on_every_kth_round_and_the_last() -> None:
    settings = config(evaluation={"every": 2}, campaign={"rounds": 5})
    history = [past(0, promoted=True)]
    evaluated = []
    for number in range(1, 6):
        evaluated.append(plan_round(settings, history, POOL).evaluate)
        history.append(past(number, promoted=True))
    assert evaluated == [False, True, False, True, True]


def test_seeds_differ_by_every_part() -> None:
    seeds = {
        derive_seed(*parts) for parts in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1)]
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("campaign", "expected"),
    [
        ({}, []),
        ({"retention": "promoted"}, [1, 3, 4]),
        ({"retention": {"last": 2}}, [1, 3]),
        ({"save_policy_every": 3}, [1, 4]),
    ],
)
def test_retention_never_deletes_what_is_needed(
    campaign: dict[str, object], expected: list[int]
) -> None:
    finished = [KeptRound(n, promoted=n in (0, 2)) for n in range(6)]
    promoting = config(campaign=campaign, reference={"promote": {"every": 2}})
    assert deletable(promoting, finished) == expected
