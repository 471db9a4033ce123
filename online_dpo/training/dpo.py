"""Preference optimization as an objective of the shared loop."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from online_dpo.training.batching import sizes_of
from online_dpo.training.data import Pair
from online_dpo.training.loss_modifiers import length_desensitized, wpo_log_weights
from online_dpo.training.objective import LoopSettings
from online_dpo.training.packing import Part, TokenPair
from online_dpo.training.preference_loss import LossInputs, PreferenceLoss
from online_dpo.training.reference import PairLogps, mismatched
from online_dpo.training.vocabulary import Terms


class DpoObjective:
    """The preference loss of pairs against recorded reference log-probs.

    `reference` is None where the loss needs none.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        reference: PairLogps | None,
        *,
        loss: PreferenceLoss,
        soft_labels: bool = False,
        device: torch.device,
    ) -> None:
        assert reference is not None or not loss.needs_reference
        self.pairs = pairs
        self.loss = loss
        self.device = device
        self.sizes = sizes_of([self.sequences(item) for item in range(len(pairs))])
        self.weights = [1] * len(pairs)
        self.coupled, self.needs_squares = loss.coupled, loss.needs_wpo
        self._soft = soft_labels or loss.needs_probs
        self._reference = None if reference is None else reference.stacked(loss.ld_alpha)
        self._mismatched = mismatched(pairs) if loss.needs_mismatched else None
        self.fingerprint = self._fingerprint()

    def item_id(self, item: int) -> str:
        """The id of a pair."""
        return self.pairs[item].pair_id

    def sequences(self, item: int) -> Sequence[TokenPair]:
        """The chosen and the rejected one of a pair."""
        pair = self.pairs[item]
        return (pair.prompt, pair.chosen), (pair.prompt, pair.rejected)

    def step_sequences(self, item: int) -> Sequence[TokenPair]:
        """The same and, where the loss wants it, another pair's response after this prompt."""
        if self._mismatched is None:
            return self.sequences(item)
        return *self.sequences(item), (self.pairs[item].prompt, self._mismatched[item])

    def terms(self, logps: Tensor, part: Part, squares: Tensor | None = None) -> Terms:
        """The summed losses of a part's pairs, and the sums of what is logged."""
        lengths = part.sequence_lengths().unflatten(0, (2, -1))  # (2, B)
        plain = weighted = part.sums(logps).unflatten(0, (2, -1))
        if self.loss.needs_token_weights:
            limits = lengths.amin(dim=0).repeat(2)
            common = part.sums(logps, limits=limits).unflatten(0, (2, -1))
            weighted = length_desensitized(plain, common, ld_alpha=self.loss.ld_alpha)
        wpo = None
        if squares is not None:
            wpo = wpo_log_weights(plain, part.sums(squares).unflatten(0, (2, -1)), lengths)
        losses = self.loss(self._inputs(weighted, part.items, plain=plain, wpo=wpo))
        return Terms(losses.sum(), self._metrics(weighted, plain, part.items))

    def step_terms(self, logps: Tensor, items: Sequence[int]) -> Terms:
        """The loss of a whole step, times its pairs, from (2, n) log-probs or (3, n)."""
        inputs = self._inputs(logps[:2], items, plain=logps[:2], mismatched=logps[2:])
        losses = self.loss(inputs)
        return Terms(losses.mean() * len(items), self._metrics(logps[:2], logps[:2], items))

    @property
    def facts(self) -> dict[str, Any]:
        """What a round trains on, in counts."""
        return {"pairs": len(self.pairs)}

    def set_reference(self, items: Sequence[int], logps: PairLogps) -> None:
        """Put the log-probs of these items in the place of those there were."""
        assert self._reference is not None
        self._reference[:, list(items)] = logps.stacked(self.loss.ld_alpha)

    def _inputs(
        self,
        policy: Tensor,
        items: Sequence[int],
        *,
        plain: Tensor,
        wpo: Tensor | None = None,
        mismatched: Tensor | None = None,
    ) -> LossInputs:
        reference = self._of(items)
        pairs = [self.pairs[item] for item in items]
        lengths = self._tensor([[len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs]])
        return LossInputs(
            policy_chosen_logps=policy[0],
            policy_rejected_logps=policy[1],
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            reference_chosen_logps=None if reference is None else reference[0],
            reference_rejected_logps=None if reference is None else reference[1],
            preference_probs=self._tensor([p.p for p in pairs]) if self._soft else None,
            margins=self._tensor([p.margin for p in pairs]),
            chosen_logps_unweighted=plain[0],
            chosen_wpo_log_weights=None if wpo is None else wpo[0],
            rejected_wpo_log_weights=None if wpo is None else wpo[1],
            policy_mismatched_logps=None if self._mismatched is None else _first(mismatched),
            reference_mismatched_logps=None if self._mismatched is None else _third(reference),
        )

    @torch.no_grad()
    def _metrics(self, policy: Tensor, plain: Tensor, items: Sequence[int]) -> dict[str, Tensor]:
        """Sums over pairs. Without a reference a reward is beta * the mean log-prob of a token, as
        in SimPO (2405.14734, eq. 3)."""
        reference = self._of(items)
        if reference is None:
            pairs = [self.pairs[item] for item in items]
            counts = [[len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs]]
            chosen, rejected = self.loss.beta * plain / self._tensor(counts)
        else:
            chosen, rejected = self.loss.beta * (policy - reference[:2])
        return {
            "margin": (chosen - rejected).sum(),
            "accuracy": (chosen > rejected).double().sum(),
            "chosen_logp": plain[0].sum(),
            "rejected_logp": plain[1].sum(),
            "chosen_reward": chosen.sum(),
            "rejected_reward": rejected.sum(),
        }

    def _of(self, items: Sequence[int]) -> Tensor | None:
        """(2, B), or (3, B), reference log-probs."""
        if self._reference is None:
            return None
        return self._reference[:, torch.tensor(items)].to(self.device)

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.loss, self._soft)).encode())
        for pair in self.pairs:
            digest.update(repr((pair.pair_id, pair.p, pair.margin)).encode())
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                digest.update(np.array([len(ids), *ids]).tobytes())
        if self._reference is not None:
            digest.update(self._reference.numpy().tobytes())
        return digest.hexdigest()


def _first(rows: Tensor | None) -> Tensor:
    assert rows is not None and len(rows) == 1
    return rows[0]


def _third(rows: Tensor | None) -> Tensor:
    assert rows is not None and len(rows) == 3, "the reference was not scored for this loss"
    return rows[2]


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
        adam_moments=train["adam_moments"],
        max_grad_norm=train["max_grad_norm"],
        checkpoint_every=train["checkpoint_every"],
        seed=plan["seed"],
        gradient_sync=train["gradient_sync"],
        stretch=plan["round"] - 1 if carried else 0,
        stretches=plan["rounds"] if carried else 1,
    )


def summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A round's figures: of the first step that has each, of the last, and means over these."""
    names = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "grad_norm")
    values = {name: [row[name] for row in metrics if name in row] for name in names}
    known = {name: of_steps for name, of_steps in values.items() if of_steps}
    return {
        **{f"first_{name}": of_steps[0] for name, of_steps in known.items()},
        **{f"last_{name}": of_steps[-1] for name, of_steps in known.items()},
        **{f"mean_{name}": sum(of_steps) / len(of_steps) for name, of_steps in known.items()},
    }
