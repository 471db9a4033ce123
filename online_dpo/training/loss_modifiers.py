"""What a setting adds to a preference loss: penalties, margins, and weights of tokens and pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def dpop_penalty(policy_chosen_logps: Tensor, reference_chosen_logps: Tensor) -> Tensor:
    """(B,) nats by which the chosen response fell below the reference: max(0, -c).

    DPO-Positive (Pal et al. 2024, Smaug, 2402.13228) puts beta (c - r - lambda max(0, -c)) into the
    sigmoid, so that the margin cannot grow by both responses becoming less likely.
    """
    return torch.relu(reference_chosen_logps - policy_chosen_logps)


def length_margin(chosen_lengths: Tensor, rejected_lengths: Tensor, *, penalty: float) -> Tensor:
    """(B,) alpha (n+ - n-), added to beta (c - r) by R-DPO (Park et al. 2024, 2403.19159).

    The sign: where the reward to maximise is q(y) - alpha |y|, the optimal policy has
    q = beta log(policy / reference) + alpha |y| + const, and preferences are by q. A longer chosen
    response has earned part of its margin by length alone, and is pushed less.
    """
    return penalty * (chosen_lengths - rejected_lengths)


def score_margin(margins: Tensor, *, weight: float) -> Tensor:
    """(B,) alpha (s+ - s-), subtracted from beta (c - r) by ODPO (Amini et al. 2024, 2402.10571).

    The offset that the judge's difference of scores `margins` demands, with the paper's increasing
    function f taken as the identity.
    """
    return weight * margins


def length_desensitized(logps: Tensor, common_logps: Tensor, *, ld_alpha: float) -> Tensor:
    """Log-probs in which tokens beyond the other response's length weigh `ld_alpha`, in [0, 1].

    LD-DPO (Liu et al. 2024, 2409.06411), for policy and reference alike: `logps` are a response's
    sums over all tokens, `common_logps` over as many as the shorter of the pair has. 1 is DPO.
    Typical: 0.3 to 0.6.
    """
    return common_logps + ld_alpha * (logps - common_logps)


def wpo_log_weights(
    policy_logps: Tensor, policy_log_sum_squares: Tensor, lengths: Tensor
) -> Tensor:
    """(B,) log-weights of responses in WPO (Zhou et al. 2024, 2406.11827, eq. 2).

    The mean over a response's tokens of log policy(y_t) - log sum_v policy(v)^2, v over the
    vocabulary ("sampled alignment": a token that the policy draws itself has weight 1 on average).
    Both logarithms come summed over tokens, in nats at temperature 1. Takes no gradient. A pair's
    loss is multiplied by exp(chosen's + rejected's).
    """
    return ((policy_logps - policy_log_sum_squares) / lengths).detach()
