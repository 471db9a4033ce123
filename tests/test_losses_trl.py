"""Preference losses and modifiers against TRL's own code, run on log-probs of our choosing.

TRL's trainers get a stand-in for the model that answers with given log-probs per token, and the
reference's sums as precomputed; everything after that is theirs.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from online_dpo.config import TrainConfig
from online_dpo.training.loss_modifiers import length_desensitized, wpo_log_weights
from online_dpo.training.losses import LOSSES
from online_dpo.training.preference_loss import LossInputs, PreferenceLoss

NUM_PAIRS = 6
WIDTH = 9


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """TRL's trainers. What importing them warns of stays here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.kto_trainer import KTOTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


class Data:
    """Random token log-probs of chosen, then rejected responses: (2 B, W) and their lengths."""

    def __init__(self, *, seed: int = 0, lengths: tuple[int, int] = (1, WIDTH)) -> None:
        random = torch.Generator().manual_seed(seed)
        rows = 2 * NUM_PAIRS
        self.lengths = torch.randint(lengths[0], lengths[1] + 1, (rows,), generator=random)
        self.mask = torch.arange(WIDTH) < self.lengths[:, None]
        self.policy = self.random(random)
        self.reference = (self.policy + 0.5 * torch.randn(rows, WIDTH, generator=random)).clamp(
            max=-0.01
        ) * self.mask
        self.log_sum_squares = self.random(random)

    def random(self, random: torch.Generator) -> Tensor:
        values = torch.rand(len(self.mask), WIDTH, dtype=torch.float64, generator=random)
        return values.clamp(min=0.05).log() * self.mask

    def chosen(self, values: Tensor) -> Tensor:
        return values[:NUM_PAIRS]

    def rejected(self, values: Tensor) -> Tensor:
        return values[NUM_PAIRS:]

    def inputs(self, policy: Tensor | None = None, reference: Tensor | None = None) -> LossInputs:
        """Log-probs (2 B,) of policy and reference, by default the sums over all tokens."""
        policy = self.policy.sum(dim=1) if policy is None else policy
        reference = self.reference.sum(dim=1) if reference is None else reference
        wpo = wpo_log_weights(self.policy.sum(dim=1), self.log_sum_squares.sum(dim=1), self.lengths)
        return LossInputs(
            policy_chosen_logps=self.chosen(policy),
            policy_rejected_logps=self.rejected(policy),
            chosen_lengths=self.chosen(self.lengths).double(),
            rejected_lengths=self.rejected(self.lengths).double(),
            reference_chosen_logps=self.chosen(reference),
            reference_rejected_logps=self.rejected(reference),
            chosen_logps_unweighted=self.chosen(self.policy.sum(dim=1)),
            chosen_wpo_log_weights=self.chosen(wpo),
            rejected_wpo_log_weights=self.rejected(wpo),
        )


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda value: value,
        gather_for_metrics=lambda value: value,
        unwrap_model=lambda model: model,
        autocast=contextlib.nullcontext,
    )


class Model:
    """Answers with the log-probs per token of `data`; the prompt is one token, which has none."""

    training = True

    def __init__(self, data: Data) -> None:
        self.data = data

    def __call__(self, **_: Any) -> SimpleNamespace:
        ones = torch.ones_like(self.data.policy)
        return SimpleNamespace(
            log_probs=self.data.policy,
            log_sum_sq_probs=self.data.log_sum_squares,
            entropy=ones,
            mean_logits=ones,
            is_top1=ones.bool(),
        )


def trl_dpo(
    trl: SimpleNamespace, data: Data, *, reference: Tensor | None = None, **args: Any
) -> float:
    """The loss of TRL's DPOTrainer; `reference` are the reference's sums (2 B,)."""
    trainer = SimpleNamespace(
        model=Model(data),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **{"ld_alpha": None, "use_weighting": False, "label_smoothing": 0.0, "beta": 0.1, **args},
    )
    sums = data.reference.sum(dim=1) if reference is None else reference
    mask = torch.cat([torch.zeros(len(data.mask), 1, dtype=torch.bool), data.mask], dim=1).long()
    batch = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": data.chosen(sums),
        "ref_rejected_logps": data.rejected(sums),
    }
    return float(trl.dpo._compute_loss(trainer, trainer.model, batch, False))


def our_loss(inputs: LossInputs, **train: Any) -> float:
    fields = TrainConfig(**train).model_dump()
    return float(PreferenceLoss.from_config(fields)(inputs).mean())


SHARED = {
    "sigmoid": "sigmoid",
    "hinge": "hinge",
    "ipo_mean": "ipo",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sigmoid_norm": "sigmoid_norm",
}
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def test_every_loss_of_their_trainer_is_compared(trl: SimpleNamespace) -> None:
    """Their only other one, sft, is `nll_weight` here."""
    source = inspect.getsource(trl.dpo._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == {*SHARED.values(), "sft"}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", SHARED)
def test_dpo_trainer(trl: SimpleNamespace, name: str, beta: float) -> None:
    data = Data()
    smoothing = 0.1 if name in SMOOTHED else 0.0
    theirs = trl_dpo(
        trl,
        data,
        loss_types=[SHARED[name]],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
    )
    ours = our_loss(data.inputs(), loss=name, beta=beta, label_smoothing=smoothing)
    single = name == "exo_pair"  # they take the logs of its labels in float32
    assert ours == pytest.approx(theirs, rel=1e-7 if single else 1e-12)


def test_weighted_sums_with_the_likelihood_of_the_chosen(trl: SimpleNamespace) -> None:
    """MPO's three terms. Their NLL is the mean over the batch's tokens, ours over pairs."""
    data = Data(lengths=(4, 4))
    theirs = trl_dpo(
        trl, data, loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]
    )
    ours = our_loss(data.inputs(), loss={"sigmoid": 0.8, "bco_pair": 0.2}, nll_weight=1.0)
    assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_ld_alpha(trl: SimpleNamespace, alpha: float) -> None:
    """Theirs is precomputed for the reference, by the same code as for the policy."""
    data = Data()
    common = torch.minimum(data.lengths, data.lengths.roll(NUM_PAIRS))
    shared = torch.arange(WIDTH) < common[:, None]
    weights = torch.ones_like(data.reference).masked_fill(~shared, alpha)
    reference = (data.reference * weights).sum(dim=1)
    theirs = trl_dpo(
        trl, data, loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=alpha, reference=reference
    )
    weighted = [
        length_desensitized(values.sum(dim=1), (values * shared).sum(dim=1), ld_alpha=alpha)
        for values in (data.policy, data.reference)
    ]
    ours = our_loss(data.inputs(*weighted), ld_alpha=alpha)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert theirs != pytest.approx(our_loss(data.inputs()), rel=1e-3)


@pytest.mark.parametrize("name", ["sigmoid", "apo_zero"])
def test_wpo(trl: SimpleNamespace, name: str) -> None:
    data = Data()
    theirs = trl_dpo(trl, data, loss_types=[name], loss_weights=[1.0], use_weighting=True)
    assert our_loss(data.inputs(), loss=name, wpo=True) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("num_good", [3, 6, 10])
@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_kto_trainer(trl: SimpleNamespace, num_good: int, shift: float) -> None:
    """Groups of unequal size; mismatched answers on which the baseline is above and below 0."""
    data = Data()
    mismatched = Data(seed=1)
    policy_mismatched = mismatched.policy.sum(dim=1)
    trainer = SimpleNamespace(
        model=Model(data),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.8,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: policy_mismatched,
    )
    mask = torch.cat([torch.zeros(len(data.mask), 1, dtype=torch.bool), data.mask], dim=1).long()
    good = torch.zeros(2 * NUM_PAIRS, dtype=torch.bool)
    good[torch.randperm(2 * NUM_PAIRS, generator=torch.Generator().manual_seed(2))[:num_good]] = (
        True
    )
    batch = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "label": good,
        "ref_logps": data.reference.sum(dim=1),
        "ref_KL_logps": policy_mismatched - shift,
    }
    theirs = float(trl.kto._compute_loss(trainer, trainer.model, batch, False))
    policy, reference = data.policy.sum(dim=1), data.reference.sum(dim=1)
    losses = LOSSES["kto"](
        policy[good],
        policy[~good],
        reference[good],
        reference[~good],
        policy_mismatched,
        policy_mismatched - shift,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.8,
    )
    assert losses.shape == (2 * NUM_PAIRS,)
    assert float(losses.mean()) == pytest.approx(theirs, rel=1e-12)


def means(data: Data) -> tuple[Tensor, Tensor]:
    values = data.policy.sum(dim=1) / data.lengths
    return data.chosen(values), data.rejected(values)


def test_simpo(trl: SimpleNamespace) -> None:
    data = Data()
    trainer = SimpleNamespace(
        accelerator=accelerator(),
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=0.0,
        loss_type="simpo",
    )
    theirs, _, _ = trl.cpo.cpo_loss(trainer, *means(data))
    inputs = data.inputs()
    fields = TrainConfig(loss="simpo", beta=2.0, loss_options={"gamma": 0.7}).model_dump()
    ours = PreferenceLoss.from_config(fields)(inputs)
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-12)


def test_orpo(trl: SimpleNamespace) -> None:
    """The odds ratio, which they compute in float32; their NLL covers the prompt, ours does not."""
    data = Data()
    trainer = SimpleNamespace(accelerator=accelerator(), beta=0.4)
    theirs = -trl.orpo.odds_ratio_loss(trainer, *means(data))[0]
    fields = TrainConfig(loss="orpo", loss_options={"lambda_": 0.4}).model_dump()
    ours = PreferenceLoss.from_config(fields)(data.inputs()) + means(data)[0]
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
