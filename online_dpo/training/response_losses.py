"""Preference losses that look at the chosen and the rejected response each by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def nca_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(B,) NCA for pairs (Chen et al. 2024, 2402.05369); beta is the paper's alpha.

    -l(beta c) - l(-beta c) / 2 - l(-beta r) / 2, l = log sigmoid: keeps the likelihood of the
    chosen response from falling. Typical: beta 0.01.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(B,) BCO for pairs (Jung et al. 2024, 2404.04656), without its shift of rewards.

    -log sigmoid(beta c) - log sigmoid(-beta r): a classifier of good and bad responses whose logit
    is the implicit reward. Typical: beta 0.01 to 0.1.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(B,) SPPO (Wu et al. 2024, 2405.00675, eq. 4.7) with win probabilities of 1 and 0.

    (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. beta is 1 / eta of the paper: typical 0.001.
    """
    target = 1.0 / (2.0 * beta)
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return (chosen - target) ** 2 + (rejected + target) ** 2


def sppo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    preference_probs: Tensor,
    *,
    eta: float,
) -> Tensor:
    """(B,) SPPO (Wu et al. 2024, 2405.00675, eq. 4.7) with the judge's p for the win probability.

    (c - eta (p - 1/2))^2 + (r - eta (1/2 - p))^2; `preference_probs` (B,) is p. The paper's win
    probability is one over the policy's responses, of which this is the pair's own estimate.
    Typical: eta 1000; a config takes 1 / train.beta.
    """
    target = eta * (preference_probs - 0.5)
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return (chosen - target) ** 2 + (rejected + target) ** 2


def apo_zero_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(B,) APO-zero (D'Oosterlinck et al. 2024, 2408.06266, eq. 7).

    1 - sigmoid(beta c) + sigmoid(beta r): chosen up, rejected down; for chosen responses that are
    better than what the policy gives. Typical: beta 0.1.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(B,) APO-down (D'Oosterlinck et al. 2024, 2408.06266, eq. 8).

    sigmoid(beta c) + 1 - sigmoid(beta (c - r)): both down, rejected further; for chosen responses
    that are worse than what the policy gives. Typical: beta 0.1.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
