"""Direct preference optimization as an objective of the shared loop."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from online_dpo.errors import ConfigError
from online_dpo.training.batching import sizes_of
from online_dpo.training.data import Pair
from online_dpo.training.loop import LoopSettings
from online_dpo.training.losses import implicit_rewards
from online_dpo.training.packing import Part, TokenPair
from online_dpo.training.preference_loss import LossInputs, PreferenceLoss
from online_dpo.training.vocabulary import Terms


class DpoObjective:
    """The preference loss of pairs against recorded reference log-probs (nats, float64)."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        reference_chosen_logps: Sequence[float],
        reference_rejected_logps: Sequence[float],
        *,
        loss: PreferenceLoss,
        device: torch.device,
    ) -> None:
        self.pairs = pairs
        self.reference_chosen_logps = torch.tensor(reference_chosen_logps, dtype=torch.float64)
        self.reference_rejected_logps = torch.tensor(reference_rejected_logps, dtype=torch.float64)
        _check_supplied(loss)
        self.loss = loss
        self.device = device
        self.sizes = sizes_of([self.sequences(item) for item in range(len(pairs))])
        self.weights = [1] * len(pairs)
        self.fingerprint = self._fingerprint()

    def sequences(self, item: int) -> Sequence[TokenPair]:
        """The chosen and the rejected one of a pair."""
        pair = self.pairs[item]
        return (pair.prompt, pair.chosen), (pair.prompt, pair.rejected)

    def terms(self, logps: Tensor, part: Part) -> Terms:
        """The summed losses of a part's pairs, and the sums of what is logged."""
        chosen, rejected = part.sums(logps).chunk(2)  # (B,) each
        index = torch.tensor(part.items)
        reference_chosen = self.reference_chosen_logps[index].to(self.device)
        reference_rejected = self.reference_rejected_logps[index].to(self.device)
        chosen_lengths, rejected_lengths = part.sequence_lengths().double().chunk(2)
        losses = self.loss(
            LossInputs(
                policy_chosen_logps=chosen,
                policy_rejected_logps=rejected,
                chosen_lengths=chosen_lengths,
                rejected_lengths=rejected_lengths,
                reference_chosen_logps=reference_chosen,
                reference_rejected_logps=reference_rejected,
            )
        )
        with torch.no_grad():
            chosen_rewards = implicit_rewards(chosen, reference_chosen, beta=self.loss.beta)
            rejected_rewards = implicit_rewards(rejected, reference_rejected, beta=self.loss.beta)
            margins = chosen_rewards - rejected_rewards
            metrics = {
                "margin": margins.sum(),
                "accuracy": (margins > 0).double().sum(),
                "chosen_logp": chosen.sum(),
                "rejected_logp": rejected.sum(),
                "chosen_reward": chosen_rewards.sum(),
                "rejected_reward": rejected_rewards.sum(),
            }
        return Terms(losses.sum(), metrics)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.loss).encode())
        for pair in self.pairs:
            digest.update(pair.pair_id.encode())
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                digest.update(np.array([len(ids), *ids]).tobytes())
        digest.update(self.reference_chosen_logps.numpy().tobytes())
        digest.update(self.reference_rejected_logps.numpy().tobytes())
        return digest.hexdigest()


def _check_supplied(loss: PreferenceLoss) -> None:
    """Raise ConfigError where a loss needs more than log-probs and lengths of a micro-batch."""
    names = ("coupled", "needs_probs", "needs_margins", "needs_token_weights", "needs_wpo")
    needs = [name for name in names if getattr(loss, name)]
    if needs:
        raise ConfigError(
            f"This training loop computes no loss that is or {', '.join(needs).replace('_', ' ')}; "
            "choose another train.loss, or switch off the setting that asks for it."
        )


def loop_settings(train: Mapping[str, Any], plan: Mapping[str, Any]) -> LoopSettings:
    """The loop's settings from TrainConfig's fields and the round's plan.

    A carried optimizer's schedule spans the campaign: a round is one of `rounds` equal stretches.
    """
    carried = train["optimizer"] == "carry"
    return LoopSettings(
        learning_rate=plan["learning_rate"],
        schedule=train["schedule"],
        warmup=train["warmup"],
        batch_size=train["batch_size"],
        micro_batch_tokens=train["micro_batch_tokens"],
        micro_batch_size=train["micro_batch_size"],
        epochs=train["epochs"],
        weight_decay=train["weight_decay"],
        adam_betas=tuple(train["adam_betas"]),
        max_grad_norm=train["max_grad_norm"],
        checkpoint_every=train["checkpoint_every"],
        seed=plan["seed"],
        stretch=plan["round"] - 1 if carried else 0,
        stretches=plan["rounds"] if carried else 1,
    )


def summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A round's figures: of the first step, of the last, and means over steps."""
    first, last = metrics[0], metrics[-1]
    names = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "grad_norm")
    return {
        **{f"first_{name}": first[name] for name in names},
        **{f"last_{name}": last[name] for name in names},
        **{f"mean_{name}": sum(row[name] for row in metrics) / len(metrics) for name in names},
    }
