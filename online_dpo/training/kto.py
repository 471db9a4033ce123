"""KTO on good and bad responses as an objective of the shared loop."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from online_dpo.training.batching import sizes_of
from online_dpo.training.packing import Part, TokenPair
from online_dpo.training.preference_loss import LossInputs, PreferenceLoss
from online_dpo.training.unpaired import Example, with_mismatched
from online_dpo.training.vocabulary import Terms


class KtoObjective:
    """The loss of single responses, each good or bad, against recorded reference log-probs.

    A step's groups are its good and its bad responses; one of them may be empty.
    """

    coupled, needs_squares = True, False

    def __init__(
        self,
        examples: Sequence[Example],
        reference: Tensor,
        *,
        loss: PreferenceLoss,
        device: torch.device,
    ) -> None:
        """`reference` has the (2, n) log-probs of `score_unpaired`."""
        assert list(loss.weights) == ["kto"], "unpaired rows are for kto alone"
        self.examples = examples
        self.loss = loss
        self._device = device
        self._wanted = with_mismatched(examples)
        self._reference = reference
        self.sizes = sizes_of([self.sequences(item) for item in range(len(examples))])
        self.weights = [1] * len(examples)
        self.fingerprint = self._fingerprint()

    def item_id(self, item: int) -> str:
        """The id of a row."""
        return self.examples[item].row_id

    def sequences(self, item: int) -> Sequence[TokenPair]:
        """The response alone."""
        return self._wanted[item][:1]

    def step_sequences(self, item: int) -> Sequence[TokenPair]:
        """The response, and another prompt's response after its prompt."""
        return self._wanted[item]

    def terms(self, logps: Tensor, part: Part, squares: Tensor | None = None) -> NoReturn:
        """Never asked for: the loss is one of a whole step."""
        raise AssertionError("kto couples the step")

    def step_terms(self, logps: Tensor, items: Sequence[int]) -> Terms:
        """The loss of a whole step, times its responses, from (2, n) log-probs."""
        reference = self._reference[:, torch.tensor(items)].to(self._device)
        good = torch.tensor([self.examples[i].good for i in items], device=self._device)
        lengths = torch.tensor([len(self.examples[i].completion) for i in items])
        lengths = lengths.to(logps)
        losses = self.loss(
            LossInputs(
                policy_chosen_logps=logps[0][good],
                policy_rejected_logps=logps[0][~good],
                chosen_lengths=lengths[good],
                rejected_lengths=lengths[~good],
                reference_chosen_logps=reference[0][good],
                reference_rejected_logps=reference[0][~good],
                policy_mismatched_logps=logps[1],
                reference_mismatched_logps=reference[1],
            )
        )
        metrics = self._metrics(logps.detach(), reference, good)
        count = len(items)
        return Terms(losses.mean() * count, {k: value * count for k, value in metrics.items()})

    def _metrics(self, logps: Tensor, reference: Tensor, good: Tensor) -> dict[str, Tensor]:
        """A step's means; a figure of responses that the step has none of is left out.

        `accuracy` counts responses on their label's side of the baseline z.
        """
        rewards, mismatched = self.loss.beta * (logps - reference)
        baseline = mismatched.mean().clamp(min=0.0)
        right = torch.where(good, rewards > baseline, rewards < baseline)
        metrics = {"accuracy": right.double().mean(), "baseline": baseline}
        for side, of_side in (("chosen", good), ("rejected", ~good)):
            if of_side.any():
                metrics[f"{side}_logp"] = logps[0][of_side].mean()
                metrics[f"{side}_reward"] = rewards[of_side].mean()
        if "chosen_reward" in metrics and "rejected_reward" in metrics:
            metrics["margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
        return metrics

    @property
    def facts(self) -> dict[str, Any]:
        """What a round trains on, in counts."""
        good = sum(example.good for example in self.examples)
        return {"unpaired": len(self.examples), "good": good, "bad": len(self.examples) - good}

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.loss).encode())
        for example in self.examples:
            digest.update(repr((example.row_id, example.good)).encode())
            for ids in (example.prompt, example.completion):
                digest.update(np.array([len(ids), *ids]).tobytes())
        digest.update(self._reference.numpy().tobytes())
        return digest.hexdigest()
