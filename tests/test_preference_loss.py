"""The loss of a config: sums, modifiers, refusals, and the policies that training reaches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from online_dpo.config import TrainConfig
from online_dpo.config_file import config_from_dict
from online_dpo.errors import ConfigError
from online_dpo.loss_rules import LOSS_FACTS, MODIFIERS, describe_loss
from online_dpo.training.loss_modifiers import length_desensitized, wpo_log_weights
from online_dpo.training.losses import LOSSES
from online_dpo.training.preference_loss import LossInputs, PreferenceLoss


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


INPUTS = LossInputs(
    policy_chosen_logps=tensor(-10.0, -20.0, -31.0),
    policy_rejected_logps=tensor(-12.0, -18.0, -30.0),
    reference_chosen_logps=tensor(-11.0, -19.5, -30.0),
    reference_rejected_logps=tensor(-11.0, -20.0, -29.5),
    chosen_lengths=tensor(5.0, 10.0, 30.0),
    rejected_lengths=tensor(6.0, 9.0, 11.0),
    preference_probs=tensor(0.9, 0.6, 1.0),
    margins=tensor(0.5, 2.0, 1.0),
    chosen_logps_unweighted=tensor(-12.0, -22.0, -40.0),
    chosen_wpo_log_weights=tensor(-0.5, 0.2, -1.0),
    rejected_wpo_log_weights=tensor(0.1, -0.3, -0.2),
    policy_mismatched_logps=tensor(-40.0, -50.0),
    reference_mismatched_logps=tensor(-45.0, -50.0),
)
HARD = replace(INPUTS, preference_probs=None)
C, R = tensor(1.0, -0.5, -1.0), tensor(-1.0, 2.0, -0.5)  # the log-ratios above


def preference_loss(**train: Any) -> PreferenceLoss:
    return PreferenceLoss.from_config(TrainConfig(**train).model_dump())


def of_config(inputs: LossInputs = HARD, **train: Any) -> list[float]:
    return preference_loss(**train)(inputs).tolist()


def close(values: Tensor) -> Any:
    return pytest.approx(values.tolist(), rel=1e-12)


def sigmoid(margins: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-margins))


def test_the_default_is_dpo() -> None:
    assert of_config(beta=0.3) == close(sigmoid(0.3 * (C - R)))


def test_each_loss_runs_from_a_config_as_it_does_alone() -> None:
    for name, facts in LOSS_FACTS.items():
        smoothing = 0.1 if name in ("robust", "exo_pair") else 0.0
        beta = {"beta": 0.3} if facts.uses_beta else {}
        inputs = INPUTS if facts.needs_probs else HARD
        losses = of_config(inputs, loss=name, label_smoothing=smoothing, **beta)
        assert len(losses) == (6 if name == "kto" else 3)
        assert all(math.isfinite(value) for value in losses)
    # (c - eta (p - 1/2))^2 + (r + eta (p - 1/2))^2 with eta = 1 / beta
    target = (tensor(0.9, 0.6, 1.0) - 0.5) / 0.3
    expected = (C - target) ** 2 + (R + target) ** 2
    assert of_config(INPUTS, loss="sppo", beta=0.3) == close(expected)


def test_knobs_reach_their_loss() -> None:
    means = INPUTS.policy_chosen_logps / INPUTS.chosen_lengths
    others = INPUTS.policy_rejected_logps / INPUTS.rejected_lengths
    expected = sigmoid(2.0 * (means - others) - 1.4)
    assert of_config(loss="simpo", beta=2.0, loss_options={"gamma": 1.4}) == close(expected)
    plain = of_config(loss="kto")
    weighted = of_config(
        loss="kto", loss_options={"desirable_weight": 2.0, "undesirable_weight": 3.0}
    )
    assert weighted == pytest.approx([2 * v for v in plain[:3]] + [3 * v for v in plain[3:]])


def test_soft_labels_reach_sigmoid() -> None:
    p = tensor(0.9, 0.6, 1.0)
    margins = 0.3 * (C - R)
    expected = p * sigmoid(margins) + (1 - p) * sigmoid(-margins)
    assert of_config(INPUTS, beta=0.3) == close(expected)


def test_weighted_sums() -> None:
    ours = of_config(loss={"sigmoid": 0.8, "bco_pair": 0.2}, beta=0.3)
    bco = sigmoid(0.3 * C) + sigmoid(-0.3 * R)
    assert ours == close(0.8 * sigmoid(0.3 * (C - R)) + 0.2 * bco)
    # a knob goes to those of the sum that have it
    ours = of_config(loss={"robust": 1.0, "hinge": 2.0}, label_smoothing=0.2, beta=0.3)
    m = 0.3 * (C - R)
    robust = (0.8 * sigmoid(m) - 0.2 * sigmoid(-m)) / 0.6
    assert ours == close(robust + 2 * torch.relu(1 - m))


def test_likelihood_of_the_chosen() -> None:
    nll = -INPUTS.policy_chosen_logps / INPUTS.chosen_lengths
    assert of_config(nll_weight=0.5) == close(sigmoid(0.1 * (C - R)) + 0.5 * nll)


def test_likelihood_is_of_all_tokens_where_tokens_are_weighted() -> None:
    nll = tensor(12.0, 22.0, 40.0) / INPUTS.chosen_lengths
    assert of_config(nll_weight=0.5, ld_alpha=0.3) == close(sigmoid(0.1 * (C - R)) + 0.5 * nll)


def test_dpop_charges_for_a_chosen_response_below_the_reference() -> None:
    penalty = tensor(0.0, 0.5, 1.0)
    expected = sigmoid(0.1 * (C - R - 5.0 * penalty))
    assert of_config(dpop_weight=5.0) == close(expected)


def test_length_penalty_and_score_margins_move_the_margin() -> None:
    longer = tensor(-1.0, 1.0, 19.0)
    assert of_config(length_penalty=0.02) == close(sigmoid(0.1 * (C - R) + 0.02 * longer))
    scores = tensor(0.5, 2.0, 1.0)
    assert of_config(margin_weight=0.3) == close(sigmoid(0.1 * (C - R) - 0.3 * scores))
    both = 0.1 * (C - R) + 0.02 * longer - 0.3 * scores
    ours = of_config(loss="hinge", length_penalty=0.02, margin_weight=0.3)
    assert ours == close(torch.relu(1 - both))


def test_wpo_weighs_pairs_and_not_the_likelihood_term() -> None:
    weights = torch.exp(tensor(-0.4, -0.1, -1.2))
    nll = -INPUTS.policy_chosen_logps / INPUTS.chosen_lengths
    expected = weights * sigmoid(0.1 * (C - R)) + nll
    assert of_config(wpo=True, nll_weight=1.0) == close(expected)


def test_wpo_weights_by_hand() -> None:
    # two tokens of probability 0.5 and 0.25 from (0.5, 0.5) and (0.25, 0.75)
    logps = tensor(math.log(0.5) + math.log(0.25)).requires_grad_()
    squares = tensor(math.log(0.5) + math.log(0.25**2 + 0.75**2))
    weights = wpo_log_weights(logps, squares, tensor(2.0))
    assert weights.exp().tolist() == pytest.approx([math.sqrt(1.0 * 0.25 / 0.625)])
    assert not weights.requires_grad


def test_tokens_beyond_the_shared_length_weigh_less() -> None:
    # -10 over all tokens, of which -6 over as many as the other response has
    logps = length_desensitized(tensor(-10.0), tensor(-6.0), ld_alpha=0.4)
    assert logps.tolist() == pytest.approx([-7.6])


@pytest.mark.parametrize(
    ("train", "needs"),
    [
        ({}, {"needs_reference", "uses_probs", "paired"}),
        ({"loss": "simpo"}, {"paired"}),
        ({"loss": {"simpo": 1, "sigmoid": 1}}, {"needs_reference", "paired"}),
        ({"loss": "sppo"}, {"needs_reference", "needs_probs", "uses_probs", "paired"}),
        ({"loss": "aot"}, {"needs_reference", "coupled", "paired"}),
        ({"loss": "aot_unpaired"}, {"needs_reference", "coupled"}),
        ({"loss": "kto"}, {"needs_reference", "coupled", "needs_mismatched"}),
        (
            {"loss": "hinge", "wpo": True, "ld_alpha": 0.5, "margin_weight": 1},
            {"needs_reference", "needs_wpo", "needs_token_weights", "needs_margins", "paired"},
        ),
    ],
)
def test_a_loss_says_what_it_needs(train: dict[str, Any], needs: set[str]) -> None:
    loss = preference_loss(**train)
    names = {name for name, kind in vars(PreferenceLoss).items() if isinstance(kind, property)}
    assert {name for name in names if getattr(loss, name)} == needs


def test_nothing_else_is_needed() -> None:
    """Each input that a loss does not ask for can be left out."""
    asked = {
        "needs_reference": ["reference_chosen_logps", "reference_rejected_logps"],
        "needs_probs": ["preference_probs"],
        "needs_margins": ["margins"],
        "needs_token_weights": ["chosen_logps_unweighted"],
        "needs_wpo": ["chosen_wpo_log_weights", "rejected_wpo_log_weights"],
        "needs_mismatched": ["policy_mismatched_logps", "reference_mismatched_logps"],
    }
    optional = {field.name for field in fields(LossInputs)} - {
        *("policy_chosen_logps", "policy_rejected_logps", "chosen_lengths", "rejected_lengths")
    }
    assert optional == {name for names in asked.values() for name in names}
    trains: list[dict[str, Any]] = [{"loss": name} for name in LOSSES]
    trains += [{"wpo": True}, {"ld_alpha": 0.5, "nll_weight": 1.0}, {"margin_weight": 0.1}]
    for train in trains:
        if train.get("loss") in ("robust", "exo_pair"):
            train["label_smoothing"] = 0.1
        loss = preference_loss(**train)
        needed = {name for need, names in asked.items() if getattr(loss, need) for name in names}
        bare = replace(INPUTS, **{name: None for name in optional - needed})
        assert torch.isfinite(loss(bare)).all(), train


# What a config refuses.


def refusal(**train: Any) -> str:
    campaign = {
        "model": {"path": "m"},
        "prompts": {"train": [{"path": "d"}], "holdout": 1},
        "judge": {"name": "heuristic"},
    }
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**campaign, "train": train})
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"loss": "sigmod"}, "train.loss: there is no loss 'sigmod'; did you mean 'sigmoid'?"),
        ({"loss": "xyz"}, "there is no loss 'xyz'; known: sigmoid, robust,"),
        ({"loss": ["sigmoid"]}, "there is no loss ['sigmoid']"),
        ({"loss": {}}, "a sum of losses names at least one"),
        ({"loss": {"sigmoid": 1, "hing": 1}}, "did you mean 'hinge'?"),
        ({"loss": {"sigmoid": -1}}, "the weight of sigmoid is a number above 0, not -1"),
        ({"loss": {"sigmoid": math.inf}}, "is a number above 0, not inf"),
        ({"loss": {"sigmoid": 1, "kto": 1}}, "kto compares two groups of responses"),
        (
            {"loss": "hinge", "label_smoothing": 0.1},
            "train.label_smoothing: no use to hinge; it is a knob of sigmoid, robust, exo_pair",
        ),
        (
            {"loss_options": {"gamma": 0.5}},
            "train.loss_options.gamma: no use to sigmoid; it is a knob of simpo",
        ),
        ({"loss": "simpo", "loss_options": {"tau": 0.1}}, "no use to simpo"),
        ({"loss_options": {"gama": 0.5}}, "did you mean 'train.loss_options.gamma'?"),
        ({"loss": "orpo", "beta": 0.2}, "train.beta: orpo has no beta"),
        ({"loss": "exo_pair"}, "exo_pair needs one above 0; its paper takes 1e-3"),
        ({"loss": "robust"}, "robust is sigmoid where no label is flipped"),
        ({"loss": "orpo", "nll_weight": 1}, "train.nll_weight: not with orpo"),
        ({"loss": "bco_pair", "dpop_weight": 5}, "train.dpop_weight: not with bco_pair"),
        ({"loss": "simpo", "length_penalty": 0.1}, "train.length_penalty: not with simpo"),
        ({"loss": "aot", "wpo": True}, "train.wpo: not with aot"),
        ({"loss": "sigmoid_norm", "ld_alpha": 0.5}, "train.ld_alpha: not with sigmoid_norm"),
        ({"loss": {"sigmoid": 1, "sppo_hard": 1}, "margin_weight": 1}, "not with sppo_hard"),
    ],
)
def test_what_would_do_nothing_is_refused(train: dict[str, Any], expected: str) -> None:
    assert expected in refusal(**train)


ON: dict[str, Any] = {
    "nll_weight": 0.5,
    "dpop_weight": 5.0,
    "length_penalty": 0.02,
    "margin_weight": 0.3,
    "ld_alpha": 0.5,
    "wpo": True,
}


def test_every_modifier_changes_each_loss_that_it_goes_with_or_is_refused() -> None:
    """ld_alpha acts on the log-probs before they come here."""
    assert set(ON) == set(MODIFIERS)
    for (key, value), name in itertools.product(ON.items(), LOSSES):
        smoothing = 0.1 if name in ("robust", "exo_pair") else 0.0
        inputs = INPUTS if LOSS_FACTS[name].needs_probs else HARD
        plain: dict[str, Any] = {"loss": name, "label_smoothing": smoothing}
        if MODIFIERS[key].fits(name, LOSS_FACTS[name]):
            ours = preference_loss(**plain, **{key: value})
            same = ours(inputs).tolist() == of_config(inputs, **plain)
            assert same == (key == "ld_alpha"), (key, name)
        else:
            assert f"train.{key}: not with {name}: " in refusal(**plain, **{key: value})


def test_a_sum_reads_as_one() -> None:
    assert describe_loss("hinge") == "hinge"
    assert describe_loss({"sigmoid": 0.8, "bco_pair": 0.2}) == "0.8 sigmoid + 0.2 bco_pair"


# Tabular policies: one logit for each response to one prompt.


def train_to_convergence(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The log-probs (A,) at which `loss` of them is smallest."""
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(dim=0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(dim=0)


def all_pairs(
    logps: Tensor, reference: Tensor, preferences: Tensor, lengths: Tensor | None = None
) -> LossInputs:
    """Every ordered pair of different responses, with the probability that the first is better."""
    first, second = (~torch.eye(len(logps), dtype=torch.bool)).nonzero().T
    lengths = torch.ones_like(logps) if lengths is None else lengths
    return LossInputs(
        policy_chosen_logps=logps[first],
        policy_rejected_logps=logps[second],
        reference_chosen_logps=reference[first],
        reference_rejected_logps=reference[second],
        chosen_lengths=lengths[first],
        rejected_lengths=lengths[second],
        preference_probs=preferences[first, second],
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_dpo_on_bradley_terry_preferences_reaches_the_optimal_policy(beta: float) -> None:
    """2305.18290, eq. 4: reference * exp(reward / beta), normalised."""
    random = torch.Generator().manual_seed(0)
    reference = torch.randn(6, dtype=torch.float64, generator=random).log_softmax(dim=0)
    rewards = 0.3 * torch.randn(6, dtype=torch.float64, generator=random)
    preferences = torch.sigmoid(rewards[:, None] - rewards[None, :])
    loss = preference_loss(beta=beta)
    policy = train_to_convergence(
        reference, lambda logps: loss(all_pairs(logps, reference, preferences)).mean()
    )
    optimum = (reference + rewards / beta).log_softmax(dim=0)
    assert torch.allclose(policy, optimum, atol=1e-6)


def test_the_length_penalty_reaches_the_policy_of_a_reward_less_length() -> None:
    """The sign of R-DPO: preferences by quality alone, a reward of quality - alpha * length."""
    random = torch.Generator().manual_seed(1)
    reference = torch.randn(6, dtype=torch.float64, generator=random).log_softmax(dim=0)
    quality = 0.3 * torch.randn(6, dtype=torch.float64, generator=random)
    lengths = tensor(3.0, 9.0, 4.0, 20.0, 12.0, 7.0)
    preferences = torch.sigmoid(quality[:, None] - quality[None, :])
    loss = preference_loss(beta=0.5, length_penalty=0.05)
    policy = train_to_convergence(
        reference, lambda logps: loss(all_pairs(logps, reference, preferences, lengths)).mean()
    )
    optimum = (reference + (quality - 0.05 * lengths) / 0.5).log_softmax(dim=0)
    assert torch.allclose(policy, optimum, atol=1e-6)
    assert float((policy.exp() * lengths).sum()) < float((reference.exp() * lengths).sum())


def test_a_pair_that_has_its_demanded_margin_is_even() -> None:
    """ODPO: where beta (c - r) is the offset, the loss is that of a margin of 0."""
    offset = replace(HARD, margins=tensor(*(0.1 * (C - R) / 0.3).tolist()))
    assert of_config(offset, margin_weight=0.3) == pytest.approx([math.log(2)] * 3)


def one_preferred(logps: Tensor) -> LossInputs:
    """Response 0 of 8 is preferred to each other one, without exception; uniform reference."""
    others = torch.arange(1, 8)
    reference = torch.full_like(logps, -math.log(8.0))
    ones = torch.ones(7, dtype=torch.float64)
    return LossInputs(
        policy_chosen_logps=logps[torch.zeros_like(others)],
        policy_rejected_logps=logps[others],
        reference_chosen_logps=reference[others],
        reference_rejected_logps=reference[others],
        chosen_lengths=ones,
        rejected_lengths=ones,
    )


def test_ipo_stays_at_its_fixed_point_where_dpo_runs_to_certainty() -> None:
    ipo, dpo = preference_loss(loss="ipo", beta=0.1), preference_loss(beta=0.1)
    start = torch.zeros(8, dtype=torch.float64)
    reached = train_to_convergence(start, lambda logps: ipo(one_preferred(logps)).mean())
    expected = math.exp(5.0) / (math.exp(5.0) + 7.0)
    assert float(reached[0].exp()) == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(0.955, abs=5e-4)
    certain = train_to_convergence(start, lambda logps: dpo(one_preferred(logps)).mean())
    assert float(certain[0].exp()) > 1.0 - 1e-12
