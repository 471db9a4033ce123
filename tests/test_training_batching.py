"""Which items a step takes, how they are dealt and packed, and the learning rate at each step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.training.batching import Size, deal, plan_steps, sizes_of
from online_dpo.training.learning_rate import lr_multiplier


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**63 - 1))
def test_every_epoch_is_a_permutation(items: int, batch: int, epochs: int, seed: int) -> None:
    steps = plan_steps(items, batch_size=batch, epochs=epochs, seed=seed)
    assert len(steps) == epochs * math.ceil(items / batch)
    for epoch in range(epochs):
        taken = [item for step in steps if step.epoch == epoch for item in step.items]
        assert sorted(taken) == list(range(items))
    assert [step.cursor for step in steps] == [
        sum(len(earlier.items) for earlier in steps[:i]) for i in range(len(steps))
    ]


def test_order_depends_on_seed_and_epoch() -> None:
    first, second = plan_steps(50, batch_size=50, epochs=2, seed=1)
    other = plan_steps(50, batch_size=50, epochs=1, seed=2)[0]
    assert len({first.items, second.items, other.items}) == 3


def test_fractions_of_an_epoch() -> None:
    assert [len(s.items) for s in plan_steps(10, batch_size=4, epochs=0.5, seed=0)] == [4, 1]
    assert [len(s.items) for s in plan_steps(10, batch_size=8, epochs=1.3, seed=0)] == [8, 2, 3]


SIZES = st.lists(
    st.builds(Size, st.integers(0, 5), st.just(7), st.integers(1, 100)), min_size=1, max_size=40
)


@given(SIZES, st.integers(1, 400), st.none() | st.integers(1, 9), st.integers(1, 5))
def test_dealing_counts_every_item_once(
    sizes: list[Size], tokens: int, most: int | None, processes: int
) -> None:
    items = range(len(sizes))
    dealt = [
        deal(items, sizes, tokens=tokens, most=most, rank=rank, num_processes=processes)
        for rank in range(processes)
    ]
    assert len({len(mine) for mine in dealt}) == 1, "a process would wait for ever in a collective"
    real = [item for mine in dealt for micro in mine if micro.real for item in micro.items]
    assert sorted(real) == list(items)
    for micro in (micro for mine in dealt for micro in mine):
        assert 0 < len(micro.items) <= (most or len(sizes))
        prompts = 7 * len({sizes[item].group for item in micro.items})
        cost = prompts + sum(sizes[item].response_tokens for item in micro.items)
        assert cost <= tokens or len(micro.items) == 1


def test_like_lengths_share_a_micro_batch() -> None:
    sizes = [Size(i, 1, n) for i, n in enumerate((9, 1, 8, 2))]
    micros = deal([0, 1, 2, 3], sizes, tokens=20, most=2, rank=0, num_processes=1)
    assert [micro.items for micro in micros] == [(1, 3), (2, 0)]


def test_items_of_a_prompt_stay_together_and_pay_for_it_once() -> None:
    sizes = [Size(0, 10, 4), Size(1, 10, 5), Size(0, 10, 6), Size(1, 10, 5)]
    micros = deal([0, 1, 2, 3], sizes, tokens=20, most=None, rank=0, num_processes=1)
    assert [micro.items for micro in micros] == [(1, 3), (0, 2)]


def test_processes_wait_for_each_other_as_little_as_can_be() -> None:
    sizes = [Size(i, 1, 9) for i in range(12)]
    for rank in range(2):
        micros = deal(range(12), sizes, tokens=1000, most=None, rank=rank, num_processes=2)
        assert [len(micro.items) for micro in micros] == [6]


def test_sizes_by_hand() -> None:
    found = sizes_of([[([1, 2], [3]), ([1, 2], [4, 5])], [([9], [3]), ([9], [7])]] * 2)
    assert found == [Size(0, 2, 3), Size(1, 1, 2), Size(0, 2, 3), Size(1, 1, 2)]
    assert found[0].tokens == 5


def multipliers(steps: int, warmup: float, schedule: str) -> list[float]:
    return [lr_multiplier(i, steps=steps, warmup=warmup, schedule=schedule) for i in range(steps)]


def test_learning_rate_by_hand() -> None:
    assert multipliers(4, 0.5, "constant") == [0.5, 1.0, 1.0, 1.0]
    assert multipliers(4, 0.0, "linear") == [1.0, 0.75, 0.5, 0.25]
    assert multipliers(4, 0.5, "linear") == [0.5, 1.0, 1.0, 0.5]
    assert multipliers(2, 0.0, "cosine") == [1.0, pytest.approx(0.5)]
    assert multipliers(2, 1.0, "cosine") == [0.5, 1.0]


@given(st.integers(1, 200), st.floats(0.0, 1.0), st.sampled_from(["cosine", "linear", "constant"]))
def test_learning_rate_rises_then_falls_and_is_never_zero(
    steps: int, warmup: float, schedule: str
) -> None:
    values = multipliers(steps, warmup, schedule)
    peak = values.index(max(values))
    assert all(0.0 < value <= 1.0 for value in values)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert max(values) == pytest.approx(1.0)


def test_a_single_step_has_the_full_rate() -> None:
    for schedule in ("cosine", "linear", "constant"):
        assert multipliers(1, 0.1, schedule) == [1.0]
