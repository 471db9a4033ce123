"""Preference losses of mean log-probs per token: variants with their own scale of beta."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def ipo_mean_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(B,) IPO (Azar et al. 2023, 2310.12036, eq. 17) on means: (c/n+ - r/n- - 1 / (2 beta))^2.

    n+ and n- are the lengths; other libraries call this one "ipo". Typical: beta 0.01 to 1, where
    the target is 1 / (2 beta) nats a token.
    """
    chosen = (policy_chosen_logps - reference_chosen_logps) / chosen_lengths
    rejected = (policy_rejected_logps - reference_rejected_logps) / rejected_lengths
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


def sigmoid_norm_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(B,) Length-normalised DPO (Lambert et al. 2024, Tulu 3, 2411.15124).

    -log sigmoid(beta (c/n+ - r/n-)) with the lengths n+ and n-. Typical: beta 5.
    """
    chosen = (policy_chosen_logps - reference_chosen_logps) / chosen_lengths
    rejected = (policy_rejected_logps - reference_rejected_logps) / rejected_lengths
    return -logsigmoid(beta * (chosen - rejected))


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float = 0.5,
) -> Tensor:
    """(B,) SimPO (Meng et al. 2024, 2405.14734, eq. 6), which has no reference.

    -log sigmoid(beta (log policy(y+)/n+ - log policy(y-)/n-) - gamma) with the target margin
    `gamma`. Typical: beta 2 to 10, gamma 0.3 to 0.8 times beta.
    """
    chosen = policy_chosen_logps / chosen_lengths
    rejected = policy_rejected_logps / rejected_lengths
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    lambda_: float = 0.1,
) -> Tensor:
    """(B,) ORPO (Hong et al. 2024, 2403.07691, eq. 6 and 7), which has neither reference nor beta.

    NLL(y+) - lambda_ log sigmoid(log odds(y+) - log odds(y-)), odds = P / (1 - P) and P the
    geometric mean of a response's token probabilities; NLL(y+) = -log P(y+).
    Typical: lambda_ 0.1 to 1.
    """
    chosen = policy_chosen_logps / chosen_lengths
    rejected = policy_rejected_logps / rejected_lengths
    log_odds_ratios = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -chosen - lambda_ * logsigmoid(log_odds_ratios)


def _log1mexp(logs: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; a probability of 1 counts as the next number below it."""
    below = logs.clamp(max=-torch.finfo(logs.dtype).eps)
    near_one = torch.log(-torch.expm1(below))
    return torch.where(below > -math.log(2.0), near_one, torch.log1p(-torch.exp(below)))
