"""TR-DPO (2404.09656): a reference that follows the policy inside a round and is scored live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from online_dpo.training.data import Pair
from online_dpo.training.dpo import DpoObjective
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.reference import PairLogps

REFERENCE_FILE = "reference.safetensors"

ScorePairs = Callable[[LogProbModel, Sequence[Pair]], PairLogps]
"""A model's log-probs of pairs; the processes share the work."""


class MovingReference:
    """A second model in memory, which an objective's reference log-probs come from in every step.

    After each `every` steps it becomes mix * policy + (1 - mix) * itself. Every process holds the
    whole of it and moves it alike.
    """

    def __init__(
        self,
        model: LogProbModel,
        sha256: str,
        objective: DpoObjective,
        score: ScorePairs,
        *,
        every: int,
        mix: float,
    ) -> None:
        """`model` is the reference's own, from the folder of this hash; it is changed in place."""
        self.model = model.requires_grad_(False)
        self.objective = objective
        self.score = score
        self.every = every
        self.mix = mix
        self.settings: dict[str, Any] = {"reference": sha256, "every": every, "mix": mix}

    def before_step(self, items: Sequence[int]) -> None:
        """Score the step's items, and hand their log-probs to the objective."""
        pairs = [self.objective.pairs[item] for item in items]
        self.objective.set_reference(items, self.score(self.model, pairs))

    @torch.no_grad()
    def after_step(self, number: int, policy: nn.Module) -> None:
        """Move, if the optimizer step of this number (from 1) is one after which it moves."""
        if number % self.every:
            return
        for own, new in zip(self.model.model.parameters(), policy.parameters(), strict=True):
            own.lerp_(new, self.mix)

    def save(self, folder: Path) -> None:
        """Write its weights into a step checkpoint."""
        weights = {n: p.detach().cpu() for n, p in self.model.model.named_parameters()}
        save_file(weights, folder / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the weights of a step checkpoint."""
        stored = load_file(folder / REFERENCE_FILE)
        for name, parameter in self.model.model.named_parameters():
            parameter.copy_(stored[name])
