"""Preference losses: pure functions of the log-probs of chosen and rejected responses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PreferenceLoss(Protocol):
    """(B,) losses of pairs; `*_logps` are (B,) log-probs summed over response tokens, in nats."""

    def __call__(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        *,
        beta: float,
        label_smoothing: float = 0.0,
        preference_probs: Tensor | None = None,
    ) -> Tensor: ...


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """(B,) beta * log(policy / reference): the reward without its constant (2305.18290, eq. 5)."""
    return beta * (policy_logps - reference_logps)


def sigmoid_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    preference_probs: Tensor | None = None,
) -> Tensor:
    """(B,) DPO's loss (Rafailov et al. 2023, 2305.18290, eq. 7): ln 2 where policy = reference.

    `preference_probs` (B,) in [0, 1] is the probability that the chosen one is better; without it
    1. `label_smoothing` is the assumed share of flipped labels (conservative DPO): the target
    becomes q = p * (1 - label_smoothing) + (1 - p) * label_smoothing, and the loss is the cross
    entropy -q log sigmoid(margin) - (1 - q) log sigmoid(-margin).
    """
    chosen = implicit_rewards(policy_chosen_logps, reference_chosen_logps, beta=beta)
    rejected = implicit_rewards(policy_rejected_logps, reference_rejected_logps, beta=beta)
    margins = chosen - rejected
    probs = torch.ones_like(margins) if preference_probs is None else preference_probs
    targets = probs * (1.0 - label_smoothing) + (1.0 - probs) * label_smoothing
    return -targets * logsigmoid(margins) - (1.0 - targets) * logsigmoid(-margins)


def nll_per_token(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """(B,) mean negative log-likelihood of a chosen token, the added term of 2404.19733, eq. 1."""
    return -policy_chosen_logps / chosen_lengths


LOSSES: Mapping[str, PreferenceLoss] = MappingProxyType({"sigmoid": sigmoid_loss})
"""The losses by the name that `train.loss` gives them."""
