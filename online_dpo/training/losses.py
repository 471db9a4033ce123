"""Preference losses by name, and those that see a pair through one number, beta (c - r).

Throughout, `*_logps` are log-probs in nats, summed over a response's tokens with a sampled EOS, and
`*_lengths` count the same tokens. c = log policy - log reference of the chosen response, r that of
the rejected one. A loss takes (B,) tensors and returns (B,); the objective is the mean of what it
returns. What it has no use for is not in its signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from online_dpo.training.group_losses import aot_loss, aot_unpaired_loss, kto_loss
from online_dpo.training.length_losses import (
    ipo_mean_loss,
    orpo_loss,
    sigmoid_norm_loss,
    simpo_loss,
)
from online_dpo.training.response_losses import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    nca_pair_loss,
    sppo_hard_loss,
    sppo_loss,
)


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """(B,) beta * log(policy / reference): the reward without its constant (2305.18290, eq. 5)."""
    return beta * (policy_logps - reference_logps)


def nll_per_token(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """(B,) mean negative log-likelihood of a chosen token, the added term of 2404.19733, eq. 1."""
    return -policy_chosen_logps / chosen_lengths


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
    1. `label_smoothing` is the assumed share of flipped labels (conservative DPO, Mitchell 2023):
    the target becomes q = p * (1 - label_smoothing) + (1 - p) * label_smoothing, and the loss is
    the cross entropy -q log sigmoid(margin) - (1 - q) log sigmoid(-margin).

    Typical: beta 0.01 to 0.5, label_smoothing 0 to 0.1.
    """
    margins = beta * (
        (policy_chosen_logps - reference_chosen_logps)
        - (policy_rejected_logps - reference_rejected_logps)
    )
    probs = torch.ones_like(margins) if preference_probs is None else preference_probs
    targets = probs * (1.0 - label_smoothing) + (1.0 - probs) * label_smoothing
    return -targets * logsigmoid(margins) - (1.0 - targets) * logsigmoid(-margins)


def robust_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.1,
) -> Tensor:
    """(B,) Robust DPO (Chowdhury et al. 2024, 2403.00409): unbiased under flipped labels.

    Its mean over labels that are flipped with probability `label_smoothing` is DPO's loss on the
    true ones. Can be negative. Typical: beta 0.01 to 0.1, label_smoothing 0.1; below 0.5.
    """
    margins = beta * (
        (policy_chosen_logps - reference_chosen_logps)
        - (policy_rejected_logps - reference_rejected_logps)
    )
    kept = -(1.0 - label_smoothing) * logsigmoid(margins)
    flipped = -label_smoothing * logsigmoid(-margins)
    return (kept - flipped) / (1.0 - 2.0 * label_smoothing)


def hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(B,) SLiC's hinge (Zhao et al. 2023, 2305.10425) on log-ratios, as in RSO (2309.06657).

    max(0, 1 - beta (c - r)): no gradient past a margin of 1. Typical: beta 0.05 to 0.5.
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return torch.relu(1.0 - beta * (chosen - rejected))


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    *,
    beta: float,
) -> Tensor:
    """(B,) IPO (Azar et al. 2023, 2310.12036, eq. 17): (c - r - 1 / (2 beta))^2; beta is its tau.

    A squared distance to a finite target, so that labels without noise do not drive the policy to
    certainty. The paper's sums over tokens; where lengths are given, c and r are means per token
    instead (`ipo_mean` in a config), which is another loss with another scale of beta.

    Typical: beta 0.1 for sums, where the target is 1 / (2 beta) nats of a whole response.
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


def exo_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """(B,) EXO for pairs (Ji et al. 2024, 2402.00856, eq. 16): a reverse KL.

    KL from (sigmoid(m), sigmoid(-m)), m = beta (c - r), to the smoothed label (1 - e, e), with
    e = `label_smoothing` above 0. Typical: beta 0.1, label_smoothing 1e-3.
    """
    margins = beta * (
        (policy_chosen_logps - reference_chosen_logps)
        - (policy_rejected_logps - reference_rejected_logps)
    )
    kept = logsigmoid(margins) - math.log1p(-label_smoothing)
    flipped = logsigmoid(-margins) - math.log(label_smoothing)
    return torch.sigmoid(margins) * kept + torch.sigmoid(-margins) * flipped


def discopop_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    tau: float = 0.05,
) -> Tensor:
    """(B,) DiscoPOP (Lu et al. 2024, 2406.08414, eq. 5): logistic and exponential loss, blended.

    With m = beta (c - r) the exponential loss has the weight sigmoid(m / tau). Neither convex nor
    monotone around m = 0. Typical: beta 0.05, tau 0.05.
    """
    margins = beta * (
        (policy_chosen_logps - reference_chosen_logps)
        - (policy_rejected_logps - reference_rejected_logps)
    )
    logistic = torch.sigmoid(-margins / tau) * -logsigmoid(margins)
    # The product of weight and exp(-m), as one power: apart they are 0 * inf where m is very small.
    exponential = torch.exp(logsigmoid(margins / tau) - margins)
    return logistic + exponential


LOSSES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "sigmoid": sigmoid_loss,
        "robust": robust_loss,
        "hinge": hinge_loss,
        "ipo": ipo_loss,
        "ipo_mean": ipo_mean_loss,
        "sigmoid_norm": sigmoid_norm_loss,
        "simpo": simpo_loss,
        "orpo": orpo_loss,
        "exo_pair": exo_pair_loss,
        "nca_pair": nca_pair_loss,
        "bco_pair": bco_pair_loss,
        "sppo_hard": sppo_hard_loss,
        "sppo": sppo_loss,
        "aot": aot_loss,
        "aot_unpaired": aot_unpaired_loss,
        "apo_zero": apo_zero_loss,
        "apo_down": apo_down_loss,
        "discopop": discopop_loss,
        "kto": kto_loss,
    }
)
"""The losses by the name that `train.loss` gives them; `online_dpo.loss_rules` says what each needs
without loading torch."""
