"""Supervised fine-tuning as an objective of the shared loop."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from online_dpo.training.batching import sizes_of
from online_dpo.training.data import Demonstration
from online_dpo.training.objective import LoopSettings
from online_dpo.training.packing import Part, TokenPair
from online_dpo.training.vocabulary import Terms


class SftObjective:
    """Cross entropy of response tokens: the mean over all response tokens of a step."""

    def __init__(self, demonstrations: Sequence[Demonstration]) -> None:
        self.demonstrations = demonstrations
        self.sizes = sizes_of([self.sequences(item) for item in range(len(demonstrations))])
        self.weights = [len(d.response) for d in demonstrations]
        self.needs_squares = self.coupled = False
        digest = hashlib.sha256()
        for demonstration in demonstrations:
            for ids in (demonstration.prompt, demonstration.response):
                digest.update(np.array([len(ids), *ids]).tobytes())
        self.fingerprint = digest.hexdigest()

    def item_id(self, item: int) -> str:
        """The place of a demonstration among those that are trained on, from 0."""
        return f"demonstration {item}"

    def sequences(self, item: int) -> Sequence[TokenPair]:
        """The one sequence of a demonstration."""
        demonstration = self.demonstrations[item]
        return ((demonstration.prompt, demonstration.response),)

    def terms(self, logps: Tensor, part: Part, squares: Tensor | None = None) -> Terms:
        """The summed negative log-likelihood of a part's response tokens."""
        return Terms(-part.sums(logps).sum(), {})


def loop_settings(
    sft: Mapping[str, Any], train: Mapping[str, Any], *, seed: int, checkpoint_every: int
) -> LoopSettings:
    """The loop's settings from SftConfig's fields; what these leave open is as in TrainConfig.

    A micro-batch holds as many tokens as one of pairs does, and as many sequences.
    """
    return LoopSettings(
        learning_rate=sft["learning_rate"],
        schedule=sft["schedule"],
        warmup=sft["warmup"],
        batch_size=sft["batch_size"],
        micro_batch_tokens=train["micro_batch_tokens"],
        micro_batch_size=2 * pairs if (pairs := train["micro_batch_size"]) else None,
        epochs=sft["epochs"],
        weight_decay=sft["weight_decay"],
        adam_betas=tuple(train["adam_betas"]),
        adam_moments=train["adam_moments"],
        max_grad_norm=train["max_grad_norm"],
        checkpoint_every=checkpoint_every,
        seed=seed,
        gradient_sync=train["gradient_sync"],
    )


def summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The loss per token of the first and the last step, and its mean over the last tenth."""
    tail = metrics[-max(1, len(metrics) // 10) :]
    return {
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "final_loss": sum(row["loss"] for row in tail) / len(tail),
    }
