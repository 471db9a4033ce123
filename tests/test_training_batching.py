"""Which items a step takes, how they are dealt and padded, and the learning rate at each step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.training.batching import deal, pad_sequences, plan_steps
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


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 5))
def test_dealing_counts_every_item_once(lengths: list[int], size: int, processes: int) -> None:
    items = range(len(lengths))
    dealt = [
        deal(items, lengths, size=size, rank=rank, num_processes=processes)
        for rank in range(processes)
    ]
    assert len({len(mine) for mine in dealt}) == 1, "a process would wait for ever in a collective"
    real = [item for mine in dealt for micro in mine if micro.real for item in micro.items]
    assert sorted(real) == list(items)
    assert all(0 < len(micro.items) <= size for mine in dealt for micro in mine)


def test_like_lengths_share_a_micro_batch() -> None:
    micros = deal([0, 1, 2, 3], [9, 1, 8, 2], size=2, rank=0, num_processes=1)
    assert [micro.items for micro in micros] == [(1, 3), (2, 0)]


def test_padding_by_hand() -> None:
    batch = pad_sequences([[5, 6], [7]], [[8], [9, 10]])
    assert batch.input_ids.tolist() == [[5, 6, 8], [7, 9, 10]]
    assert list(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)) == [
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert batch.columns.tolist() == [0, 0, 1]
    assert batch.targets.tolist() == [8, 9, 10]
    assert pad_sequences([[1, 2, 3], [1]], [[4], [5]]).input_ids.tolist() == [
        [1, 2, 3, 4],
        [1, 5, 0, 0],
    ]


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
