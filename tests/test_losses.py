"""Preference losses against numbers worked by hand, formulas of their own, and their symmetries."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.loss_rules import LOSS_FACTS
from online_dpo.training.losses import LOSSES, implicit_rewards, nll_per_token, sigmoid_loss

logp = st.floats(-300.0, 0.0)
beta = st.floats(0.01, 2.0)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


GOLDEN_INPUTS = {
    "policy_chosen_logps": tensor(-10.0, -20.0),
    "policy_rejected_logps": tensor(-12.0, -18.0),
    "reference_chosen_logps": tensor(-11.0, -19.5),
    "reference_rejected_logps": tensor(-11.0, -20.0),
    "chosen_lengths": tensor(5.0, 10.0),
    "rejected_lengths": tensor(6.0, 9.0),
    "beta": 0.1,
}
GOLDEN_MEANS = {
    "sigmoid": 0.712039,
    "hinge": 1.025000,
    "ipo_mean": 24.632052,
    "exo_pair": 0.530749,
    "nca_pair": 1.395276,
    "robust": 0.715164,
    "bco_pair": 1.402696,
    "sppo_hard": 55.625000,
    "aot": 0.707048,
    "aot_unpaired": 0.703928,
    "apo_zero": 1.006187,
    "apo_down": 1.012412,
    "discopop": 0.821884,
    "sigmoid_norm": 0.690916,
}
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def call(name: str, inputs: dict[str, Any], **knobs: Any) -> torch.Tensor:
    """A loss with those of the inputs and knobs that its signature has."""
    parameters = inspect.signature(LOSSES[name]).parameters
    given = {key: value for key, value in {**inputs, **knobs}.items() if key in parameters}
    return LOSSES[name](**given)


@pytest.mark.parametrize("name", GOLDEN_MEANS)
def test_golden_means(name: str) -> None:
    knobs = {"label_smoothing": 0.1 if name in SMOOTHED else 0.0, "tau": 0.05}
    losses = call(name, GOLDEN_INPUTS, **knobs)
    assert losses.shape == (2,)
    assert float(losses.mean()) == pytest.approx(GOLDEN_MEANS[name], abs=5e-7)


def test_ipo_sums_unless_lengths_are_given() -> None:
    lengths = ("chosen_lengths", "rejected_lengths")
    sums = {key: value for key, value in GOLDEN_INPUTS.items() if key not in lengths}
    # D is 2 and -2.5; the target 1 / (2 * 0.1) is 5
    assert LOSSES["ipo"](**sums).tolist() == pytest.approx([9.0, 56.25])
    assert LOSSES["ipo"](**GOLDEN_INPUTS).tolist() == LOSSES["ipo_mean"](**GOLDEN_INPUTS).tolist()


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


def test_smoothing_equals_a_soft_label() -> None:
    args = (tensor(-5.0), tensor(-9.0), tensor(-6.0), tensor(-7.0))
    smoothed = sigmoid_loss(*args, beta=0.3, label_smoothing=0.2)
    soft = sigmoid_loss(*args, beta=0.3, preference_probs=tensor(0.8))
    assert float(smoothed) == pytest.approx(float(soft), rel=1e-12)


def test_rewards_and_likelihood_term() -> None:
    assert implicit_rewards(tensor(-3.0), tensor(-5.0), beta=0.1).tolist() == pytest.approx([0.2])
    assert nll_per_token(tensor(-6.0, -2.0), torch.tensor([3, 4])).tolist() == [2.0, 0.5]


# Formulas in numpy, one float64 pair at a time, for what TRL does not have in this form.


def s(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def log_odds(logp: float, length: float) -> float:
    p = math.exp(logp / length)
    return math.log(p / (1.0 - p))


Pair = dict[str, float]
FORMULAS: dict[str, Callable[[Pair], float]] = {
    "sigmoid": lambda x: (
        -x["p"] * math.log(s(x["beta"] * (x["c"] - x["r"])))
        - (1 - x["p"]) * math.log(s(-x["beta"] * (x["c"] - x["r"])))
    ),
    "ipo": lambda x: (x["c"] - x["r"] - 1 / (2 * x["beta"])) ** 2,
    "simpo": lambda x: (
        -math.log(s(x["beta"] * (x["pc"] / x["nc"] - x["pr"] / x["nr"]) - x["gamma"]))
    ),
    "orpo": lambda x: (
        -x["pc"] / x["nc"]
        - x["lambda_"] * math.log(s(log_odds(x["pc"], x["nc"]) - log_odds(x["pr"], x["nr"])))
    ),
    "sppo": lambda x: (
        (x["c"] - x["eta"] * (x["p"] - 0.5)) ** 2 + (x["r"] - x["eta"] * (0.5 - x["p"])) ** 2
    ),
}


def random_inputs(seed: int, num_pairs: int) -> dict[str, Any]:
    """Log-probs of responses of 1 to 12 tokens, policy and reference some nats apart."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 13, size=(2, num_pairs))
    reference = -random.gamma(2.0, 1.0, size=(2, num_pairs)) * lengths
    policy = np.minimum(reference + random.normal(size=(2, num_pairs)) * 2.0, -0.05)
    arrays = {
        "policy_chosen_logps": policy[0],
        "policy_rejected_logps": policy[1],
        "reference_chosen_logps": reference[0],
        "reference_rejected_logps": reference[1],
        "chosen_lengths": lengths[0].astype(float),
        "rejected_lengths": lengths[1].astype(float),
        "preference_probs": random.uniform(size=num_pairs),
    }
    return {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str) -> None:
    inputs = random_inputs(0, 16)
    knobs = {"beta": 0.3, "gamma": 0.7, "lambda_": 0.4, "eta": 3.0}
    if name == "ipo":
        del inputs["chosen_lengths"], inputs["rejected_lengths"]
    losses = call(name, inputs, **knobs)
    inputs = random_inputs(0, 16)
    for i in range(16):
        pc, pr, rc, rr, nc, nr, p = (float(inputs[key][i]) for key in inputs)
        pair = {"pc": pc, "pr": pr, "c": pc - rc, "r": pr - rr, "nc": nc, "nr": nr, "p": p, **knobs}
        assert float(losses[i]) == pytest.approx(FORMULAS[name](pair), rel=1e-10)


def test_kto_on_groups_of_unequal_size() -> None:
    losses = LOSSES["kto"](
        policy_chosen_logps=tensor(-4.0, -6.0, -5.0),
        policy_rejected_logps=tensor(-3.0),
        reference_chosen_logps=tensor(-5.0, -5.0, -5.0),
        reference_rejected_logps=tensor(-5.0),
        policy_mismatched_logps=tensor(-8.0, -9.0, -9.0, -8.0),
        reference_mismatched_logps=tensor(-9.0, -9.0, -9.0, -9.0),
        beta=0.5,
        desirable_weight=1.5,
        undesirable_weight=2.0,
    )
    # z = 0.5; c = 1, -1, 0; r = 2
    good = [1.5 * (1 - s(0.5 * (c - 0.5))) for c in (1.0, -1.0, 0.0)]
    assert losses.tolist() == pytest.approx([*good, 2.0 * (1 - s(0.5 * (0.5 - 2.0)))], rel=1e-12)


def test_ktos_baseline_is_never_negative_and_takes_no_gradient() -> None:
    mismatched = tensor(-9.0, -8.0).requires_grad_()
    chosen = tensor(-4.0).requires_grad_()
    logps = (chosen, tensor(-3.0), tensor(-5.0), tensor(-5.0), mismatched, tensor(-5.0, -5.0))
    losses = LOSSES["kto"](*logps, beta=0.5)
    assert losses.tolist() == pytest.approx([1 - s(0.5), 1 - s(-1.0)], rel=1e-12)
    losses.sum().backward()
    assert mismatched.grad is None and chosen.grad is not None


@pytest.mark.parametrize(("num_chosen", "num_rejected"), [(3, 5), (4, 2), (1, 4), (6, 4), (5, 5)])
def test_unpaired_aot_is_the_transport_cost(num_chosen: int, num_rejected: int) -> None:
    """Against both groups repeated to one size, where the quantiles match one to one."""
    random = torch.Generator().manual_seed(num_chosen * 10 + num_rejected)
    chosen = torch.randn(num_chosen, dtype=torch.float64, generator=random)
    rejected = torch.randn(num_rejected, dtype=torch.float64, generator=random)
    losses = LOSSES["aot_unpaired"](
        chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected), beta=0.7
    )
    assert losses.shape == (num_chosen + num_rejected - math.gcd(num_chosen, num_rejected),)
    a = np.sort(np.repeat(chosen.numpy(), num_rejected))
    b = np.sort(np.repeat(rejected.numpy(), num_chosen))
    assert float(losses.mean()) == pytest.approx(np.log1p(np.exp(-0.7 * (a - b))).mean(), rel=1e-12)


def test_extreme_log_ratios_stay_finite() -> None:
    """Policies that have moved by thousands of nats, and a response of probability 1."""
    for far in (4000.0, -4000.0):
        for name in LOSSES:
            policy = tensor(-4001.0 + far, -4001.0).requires_grad_()
            other = tensor(-4001.0, -4001.0 - far).requires_grad_()
            reference = tensor(-4001.0, -4001.0)
            inputs = inputs_of(policy, other, reference, reference, tensor(5.0, 5.0))
            losses = call(name, inputs, beta=0.5, eta=2.0)
            losses.sum().backward()
            assert not losses.isnan().any(), name
            if name != "discopop":  # its exponential part has no bound
                assert losses.isfinite().all(), name
                assert policy.grad is not None and policy.grad.isfinite().all(), name
    certain = tensor(0.0).requires_grad_()
    losses = LOSSES["orpo"](certain, tensor(-1.0), tensor(1.0), tensor(1.0))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(certain.grad).all()  # type: ignore[union-attr]


# Properties.


def inputs_of(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    lengths: torch.Tensor,
) -> dict[str, Any]:
    return {
        "policy_chosen_logps": policy_chosen,
        "policy_rejected_logps": policy_rejected,
        "reference_chosen_logps": reference_chosen,
        "reference_rejected_logps": reference_rejected,
        "chosen_lengths": lengths,
        "rejected_lengths": lengths,
        "policy_mismatched_logps": reference_chosen,
        "reference_mismatched_logps": reference_chosen,
        "preference_probs": torch.full_like(lengths, 0.8),
    }


LN2 = math.log(2.0)
CONSTANTS: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda b, e: LN2,
    "robust": lambda b, e: LN2,
    "hinge": lambda b, e: 1.0,
    "ipo": lambda b, e: 1 / (4 * b * b),
    "ipo_mean": lambda b, e: 1 / (4 * b * b),
    "sigmoid_norm": lambda b, e: LN2,
    "exo_pair": lambda b, e: -LN2 - 0.5 * math.log(e * (1 - e)),
    "nca_pair": lambda b, e: 2 * LN2,
    "bco_pair": lambda b, e: 2 * LN2,
    "sppo_hard": lambda b, e: 1 / (2 * b * b),
    "sppo": lambda b, e: 2 * (0.3 / b) ** 2,
    "aot": lambda b, e: LN2,
    "aot_unpaired": lambda b, e: LN2,
    "apo_zero": lambda b, e: 1.0,
    "apo_down": lambda b, e: 1.0,
    "discopop": lambda b, e: (LN2 + 1) / 2,
    "kto": lambda b, e: 0.5,
}


def test_each_loss_has_facts_and_a_constant_or_no_reference() -> None:
    with_reference = {name for name, facts in LOSS_FACTS.items() if facts.needs_reference}
    assert set(CONSTANTS) == with_reference and set(LOSS_FACTS) == set(LOSSES)


@given(
    logps=st.lists(logp, min_size=6, max_size=6),
    beta=beta,
    smoothing=st.floats(0.01, 0.4),
    lengths=st.lists(st.integers(1, 50), min_size=3, max_size=3),
)
def test_policy_equal_to_reference_gives_a_known_constant(
    logps: list[float], beta: float, smoothing: float, lengths: list[int]
) -> None:
    chosen, rejected = tensor(*logps[:3]), tensor(*logps[3:])
    inputs = inputs_of(chosen, rejected, chosen, rejected, tensor(*lengths))
    for name, constant in CONSTANTS.items():
        losses = call(name, inputs, beta=beta, eta=1.0 / beta, label_smoothing=smoothing)
        expected = [constant(beta, smoothing)] * len(losses)
        assert losses.tolist() == pytest.approx(expected, rel=1e-9), name


@settings(max_examples=20)
@given(logps=st.lists(logp, min_size=2, max_size=2), beta=beta)
def test_swapping_the_pair_flips_the_gradient(logps: list[float], beta: float) -> None:
    """Where policy = reference, for simpo where both are as likely; apo_down lowers both responses
    and orpo raises the likelihood of whichever is chosen. discopop alone starts downhill."""
    for name in set(LOSSES) - {"apo_down", "orpo"}:
        start = logps if LOSS_FACTS[name].needs_reference else [logps[0]] * 2
        reference = [tensor(value) for value in start]
        gradients = []
        for order in (1, -1):
            policy = [value.clone().requires_grad_() for value in reference]
            inputs = inputs_of(*policy[::order], *reference[::order], tensor(7.0))
            losses = call(name, inputs, beta=beta, eta=1.0 / beta, label_smoothing=0.1)
            losses.sum().backward()
            gradients.append([float(value.grad) for value in policy])  # type: ignore[arg-type]
        forward, back = gradients
        assert back == pytest.approx([-g for g in forward], rel=1e-9), name
        assert forward[0] < 0 < forward[1] or name == "discopop", name


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


DIFFERENCES = [name for name, facts in LOSS_FACTS.items() if facts.of_difference]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_losses_of_the_difference_push_both_responses_alike(name: str) -> None:
    """What `of_difference` says: raising c and r together changes nothing."""
    inputs = random_inputs(4, 6)
    del inputs["chosen_lengths"], inputs["rejected_lengths"]
    policy = [inputs["policy_chosen_logps"], inputs["policy_rejected_logps"]]
    before = call(name, inputs, beta=0.3)
    for value in policy:
        value += 1.7
        value.requires_grad_()
    after = call(name, inputs, beta=0.3)
    assert after.tolist() == pytest.approx(before.tolist(), rel=1e-9)
    after.sum().backward()
    assert torch.equal(policy[0].grad, -policy[1].grad)  # type: ignore[arg-type, operator]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_analytic_and_numeric_gradients_agree(name: str) -> None:
    inputs = random_inputs(3, 4)
    inputs["policy_mismatched_logps"] = tensor(-3.0, -4.0)
    inputs["reference_mismatched_logps"] = tensor(-5.0, -5.0)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        policy = {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
        return call(name, {**inputs, **policy}, beta=0.3, eta=2.0)

    policy = (inputs["policy_chosen_logps"], inputs["policy_rejected_logps"])
    assert torch.autograd.gradcheck(loss, [value.clone().requires_grad_() for value in policy])


def test_facts_are_those_of_the_signatures() -> None:
    tensors = {"policy_chosen_logps", "policy_rejected_logps"}
    for name, facts in LOSS_FACTS.items():
        parameters = inspect.signature(LOSSES[name]).parameters
        needed = {key for key, p in parameters.items() if p.default is inspect.Parameter.empty}
        has = set(parameters)
        assert facts.needs_reference == ("reference_chosen_logps" in needed)
        assert facts.needs_lengths == ("chosen_lengths" in needed)
        assert facts.needs_probs == ("preference_probs" in needed)
        assert facts.uses_probs == ("preference_probs" in has)
        assert facts.needs_mismatched == ("policy_mismatched_logps" in needed)
        own = has - tensors - {"beta", "eta", "preference_probs"}
        knobs = {key for key in own if not key.endswith(("_logps", "_lengths"))}
        assert set(facts.knobs) == knobs, name
        assert facts.uses_beta == ("beta" in has or "eta" in has), name


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_coupled_losses_and_no_others_depend_on_the_batch(name: str) -> None:
    inputs = random_inputs(5, 8)
    inputs["policy_mismatched_logps"] = inputs["policy_chosen_logps"].roll(1) + 3.0
    inputs["reference_mismatched_logps"] = inputs["reference_chosen_logps"].roll(1)
    whole = call(name, inputs, beta=0.3, eta=2.0).mean()
    halves = [
        call(
            name,
            {
                key: value[half] if torch.is_tensor(value) else value
                for key, value in inputs.items()
            },
            beta=0.3,
            eta=2.0,
        ).mean()
        for half in (slice(0, 4), slice(4, 8))
    ]
    parts = float(sum(halves)) / 2
    if LOSS_FACTS[name].coupled:
        assert abs(parts - float(whole)) > 1e-4
    else:
        assert parts == pytest.approx(float(whole), rel=1e-12)


def test_losses_are_public_by_name() -> None:
    assert LOSSES["sigmoid"] is sigmoid_loss
    with pytest.raises(TypeError):
        LOSSES["mine"] = sigmoid_loss  # type: ignore[index]
