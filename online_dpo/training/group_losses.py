"""Preference losses that couple the batch: their groups are those of one optimizer step.

Computed over micro-batches or over the shards of several processes they are other losses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(B,) AOT on pairs (Melnyk et al. 2024, 2406.05882): quantiles instead of pairs.

    DPO's loss, smoothed labels included, with D = sort(log policy(y+) / policy(y-)) less
    sort(log reference(y+) / reference(y-)). Ordered by D's quantile, not by pair.
    Typical: beta 0.01 to 0.1, label_smoothing 0.
    """
    policy = (policy_chosen_logps - policy_rejected_logps).sort().values
    reference = (reference_chosen_logps - reference_rejected_logps).sort().values
    return _smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(B,) AOT without pairs (Melnyk et al. 2024, 2406.05882): chosen (N,), rejected (M,).

    DPO's loss, smoothed labels included, with D = sort(c) - sort(r). For N = M that is (N,), by
    quantile. For other sizes the quantile functions have K = N + M - gcd(N, M) steps between them:
    the result is (K,), each step's loss times K and its share, so that its mean is the optimal
    transport cost. Typical: beta 0.01 to 0.1, label_smoothing 0.
    """
    chosen = (policy_chosen_logps - reference_chosen_logps).sort().values
    rejected = (policy_rejected_logps - reference_rejected_logps).sort().values
    num_chosen, num_rejected = len(chosen), len(rejected)
    # Steps end at i / N and j / M; counted in units of 1 / (N M) all of them are integers.
    ranks = torch.arange(1, max(num_chosen, num_rejected) + 1, device=chosen.device)
    ends = torch.cat([ranks[:num_chosen] * num_rejected, ranks[:num_rejected] * num_chosen])
    ends = ends.unique()  # (K,) ascending
    widths = ends.diff(prepend=ends.new_zeros(1))
    starts = ends - widths
    margins = chosen[starts // num_rejected] - rejected[starts // num_chosen]
    shares: Tensor = (widths * len(ends)).to(margins.dtype) / (num_chosen * num_rejected)
    return shares * _smoothed(beta * margins, label_smoothing)


def kto_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    policy_mismatched_logps: Tensor,
    reference_mismatched_logps: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """(N + M,) KTO (Ethayarajh et al. 2024, 2402.01306, eq. 7): good (N,) and bad (M,) responses.

    The N losses w_d (1 - sigmoid(beta (c - z))) of the good, then the M losses
    w_u (1 - sigmoid(beta (z - r))) of the bad ones. z >= 0 stands for the KL: the mean log-ratio of
    `*_mismatched_logps` (L,), log-probs of the step's responses after prompts that they do not
    answer. It takes no gradient.

    Typical: beta 0.1; weights 1, or such that w_d N / (w_u M) lies in [1, 4/3] (eq. 8).
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    mismatched = policy_mismatched_logps - reference_mismatched_logps
    baseline = mismatched.detach().mean().clamp(min=0.0)
    good = desirable_weight * torch.sigmoid(beta * (baseline - chosen))
    bad = undesirable_weight * torch.sigmoid(beta * (rejected - baseline))
    return torch.cat([good, bad])


def _smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    return -(1.0 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
