"""The loss that a config asks for: named losses, summed and modified, as one function of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from online_dpo.loss_rules import LOSS_FACTS, MODIFIERS, loss_weights
from online_dpo.training.loss_modifiers import dpop_penalty, length_margin, score_margin
from online_dpo.training.losses import LOSSES, nll_per_token


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What is known of the pairs of one step: (B,) float64 tensors, log-probs summed, in nats.

    Where `needs_token_weights`, the four log-probs are those of `length_desensitized`, and
    `chosen_logps_unweighted` has the policy's plain ones for the NLL. `preference_probs` is the
    judge's p where labels are soft or `needs_probs`, otherwise None. `margins` are differences of
    the judge's scores, `*_wpo_log_weights` come from `wpo_log_weights`, `*_mismatched_logps` (L,)
    are log-probs of responses after prompts that they do not answer. Each is needed where the
    loss says so. For losses that are not `paired`, chosen (N,) and rejected (M,) are two groups.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen_logps: Tensor | None = None
    reference_rejected_logps: Tensor | None = None
    preference_probs: Tensor | None = None
    margins: Tensor | None = None
    chosen_logps_unweighted: Tensor | None = None
    chosen_wpo_log_weights: Tensor | None = None
    rejected_wpo_log_weights: Tensor | None = None
    policy_mismatched_logps: Tensor | None = None
    reference_mismatched_logps: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """A weighted sum of losses with its modifiers; called with a step's inputs, it returns (B,).

    The step's objective is the mean of what is returned, which for `kto` is (N + M,), for the other
    losses (B,), and for `aot_unpaired` on groups of unequal size see there. Where it is `coupled`,
    the inputs are those of the whole optimizer step; otherwise any part of it will do.
    """

    weights: Mapping[str, float]
    beta: float
    knobs: Mapping[str, float]
    nll_weight: float = 0.0
    dpop_weight: float = 0.0
    length_penalty: float = 0.0
    margin_weight: float = 0.0
    ld_alpha: float = 1.0
    wpo: bool = False

    @classmethod
    def from_config(cls, train: Mapping[str, Any]) -> PreferenceLoss:
        """The loss of TrainConfig's fields, which that class has checked against each other."""
        options = {k: v for k, v in train["loss_options"].items() if v is not None}
        return cls(
            weights=loss_weights(train["loss"]),
            beta=train["beta"],
            knobs={"label_smoothing": train["label_smoothing"], **options},
            **{name: train[name] for name in MODIFIERS},
        )

    @property
    def needs_reference(self) -> bool:
        return any(LOSS_FACTS[name].needs_reference for name in self.weights)

    @property
    def needs_probs(self) -> bool:
        return any(LOSS_FACTS[name].needs_probs for name in self.weights)

    @property
    def uses_probs(self) -> bool:
        """Whether soft labels would reach every loss of the sum."""
        return all(LOSS_FACTS[name].uses_probs for name in self.weights)

    @property
    def needs_mismatched(self) -> bool:
        return any(LOSS_FACTS[name].needs_mismatched for name in self.weights)

    @property
    def needs_margins(self) -> bool:
        return self.margin_weight != 0.0

    @property
    def needs_token_weights(self) -> bool:
        return self.ld_alpha != 1.0

    @property
    def needs_wpo(self) -> bool:
        return self.wpo

    @property
    def coupled(self) -> bool:
        return any(LOSS_FACTS[name].coupled for name in self.weights)

    @property
    def paired(self) -> bool:
        return all(LOSS_FACTS[name].paired for name in self.weights)

    def __call__(self, inputs: LossInputs) -> Tensor:
        shifted = self._shifted(inputs)
        terms = [weight * self._one(name, shifted) for name, weight in self.weights.items()]
        losses = torch.stack(terms).sum(dim=0)
        if self.wpo:
            chosen = _given(inputs.chosen_wpo_log_weights, "chosen_wpo_log_weights")
            rejected = _given(inputs.rejected_wpo_log_weights, "rejected_wpo_log_weights")
            losses = torch.exp(chosen + rejected).detach() * losses
        if self.nll_weight:
            logps = inputs.policy_chosen_logps
            if self.needs_token_weights:
                logps = _given(inputs.chosen_logps_unweighted, "chosen_logps_unweighted")
            losses = losses + self.nll_weight * nll_per_token(logps, inputs.chosen_lengths)
        return losses

    def _one(self, name: str, inputs: LossInputs) -> Tensor:
        """The loss `name` with what its signature asks for."""
        facts = LOSS_FACTS[name]
        arguments: dict[str, Any] = {
            key: self.knobs[key] for key in facts.knobs if key in self.knobs
        }
        tensors = ["policy_chosen_logps", "policy_rejected_logps"]
        if facts.needs_reference:
            tensors += ["reference_chosen_logps", "reference_rejected_logps"]
        if facts.needs_lengths:
            tensors += ["chosen_lengths", "rejected_lengths"]
        if facts.needs_probs or (facts.uses_probs and inputs.preference_probs is not None):
            tensors += ["preference_probs"]
        if facts.needs_mismatched:
            tensors += ["policy_mismatched_logps", "reference_mismatched_logps"]
        arguments |= {key: _given(getattr(inputs, key), key) for key in tensors}
        if name == "sppo":
            arguments["eta"] = 1.0 / self.beta
        elif facts.uses_beta:
            arguments["beta"] = self.beta
        return LOSSES[name](**arguments)

    def _shifted(self, inputs: LossInputs) -> LossInputs:
        """The inputs with what the modifiers add to beta (c - r) moved into c.

        Only losses of that difference come with such a modifier, and for them it is the same.
        """
        added: list[Tensor] = []
        if self.dpop_weight:
            reference = _given(inputs.reference_chosen_logps, "reference_chosen_logps")
            added.append(-self.dpop_weight * dpop_penalty(inputs.policy_chosen_logps, reference))
        if self.length_penalty:
            lengths = (inputs.chosen_lengths, inputs.rejected_lengths)
            added.append(length_margin(*lengths, penalty=self.length_penalty) / self.beta)
        if self.margin_weight:
            margins = _given(inputs.margins, "margins")
            added.append(-score_margin(margins, weight=self.margin_weight) / self.beta)
        if not added:
            return inputs
        chosen = inputs.policy_chosen_logps + torch.stack(added).sum(dim=0)
        return replace(inputs, policy_chosen_logps=chosen)


def _given(value: Tensor | None, name: str) -> Tensor:
    assert value is not None, f"this loss needs {name}"
    return value
