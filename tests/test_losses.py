"""Preference losses against numbers worked by hand, and their symmetries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.training.losses import LOSSES, implicit_rewards, nll_per_token, sigmoid_loss

logp = st.floats(-300.0, 0.0)
beta = st.floats(0.01, 2.0)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(pc: float, pr: float, rc: float, rr: float, **kwargs: float) -> float:
    return float(sigmoid_loss(tensor(pc), tensor(pr), tensor(rc), tensor(rr), **kwargs))  # type: ignore[arg-type]


def test_by_hand() -> None:
    # chosen reward 0.5 * (-10 + 11) = 0.5, rejected 0.5 * (-12 + 11) = -0.5; -log sigmoid(1)
    assert loss_of(-10.0, -12.0, -11.0, -11.0, beta=0.5) == pytest.approx(0.3132616875182228)


def test_label_smoothing_by_hand() -> None:
    # margin 1: 0.9 * 0.3132617 + 0.1 * 1.3132617
    value = loss_of(-10.0, -12.0, -11.0, -11.0, beta=0.5, label_smoothing=0.1)
    assert value == pytest.approx(0.4132616875182228)


def test_soft_labels_by_hand() -> None:
    losses = sigmoid_loss(
        tensor(-10.0, -10.0, -10.0),
        tensor(-12.0, -12.0, -12.0),
        tensor(-11.0, -11.0, -11.0),
        tensor(-11.0, -11.0, -11.0),
        beta=0.5,
        preference_probs=tensor(1.0, 0.7, 0.0),
    )
    # -log sigmoid(1), 0.7 * that + 0.3 * (1 + that), 1 + that
    assert losses.tolist() == pytest.approx([0.3132616875, 0.6132616875, 1.3132616875])


@given(chosen=logp, rejected=logp, beta=beta)
def test_policy_equal_to_reference_gives_ln_2(chosen: float, rejected: float, beta: float) -> None:
    assert loss_of(chosen, rejected, chosen, rejected, beta=beta) == math.log(2)


@given(pc=logp, pr=logp, rc=logp, rr=logp, beta=beta, smoothing=st.floats(0.0, 0.49))
def test_swapping_the_pair_swaps_the_labels(
    pc: float, pr: float, rc: float, rr: float, beta: float, smoothing: float
) -> None:
    ones = tensor(1.0)
    args = (tensor(pc), tensor(pr), tensor(rc), tensor(rr))
    swapped = (args[1], args[0], args[3], args[2])
    forward = sigmoid_loss(*args, beta=beta, label_smoothing=smoothing, preference_probs=ones)
    back = sigmoid_loss(*swapped, beta=beta, label_smoothing=smoothing, preference_probs=1 - ones)
    assert float(forward) == pytest.approx(float(back), rel=1e-12)


@given(pc=logp, pr=logp, rc=logp, rr=logp, beta=beta)
def test_gradient(pc: float, pr: float, rc: float, rr: float, beta: float) -> None:
    policy = [tensor(pc).requires_grad_(), tensor(pr).requires_grad_()]
    sigmoid_loss(*policy, tensor(rc), tensor(rr), beta=beta).sum().backward()
    margin = beta * ((pc - rc) - (pr - rr))
    weight = 1.0 / (1.0 + math.exp(min(margin, 700.0)))  # 2305.18290, section 4: the gradient
    assert float(policy[0].grad) == pytest.approx(-beta * weight, rel=1e-9, abs=1e-300)  # type: ignore[arg-type]
    assert float(policy[1].grad) == -float(policy[0].grad)  # type: ignore[arg-type]


def test_smoothing_equals_a_soft_label() -> None:
    args = (tensor(-5.0), tensor(-9.0), tensor(-6.0), tensor(-7.0))
    smoothed = sigmoid_loss(*args, beta=0.3, label_smoothing=0.2)
    soft = sigmoid_loss(*args, beta=0.3, preference_probs=tensor(0.8))
    assert float(smoothed) == pytest.approx(float(soft), rel=1e-12)


def test_rewards_and_likelihood_term() -> None:
    assert implicit_rewards(tensor(-3.0), tensor(-5.0), beta=0.1).tolist() == pytest.approx([0.2])
    assert nll_per_token(tensor(-6.0, -2.0), torch.tensor([3, 4])).tolist() == [2.0, 0.5]


def test_losses_are_public_by_name() -> None:
    assert LOSSES["sigmoid"] is sigmoid_loss
    with pytest.raises(TypeError):
        LOSSES["mine"] = sigmoid_loss  # type: ignore[index]
