"""Losses that couple the items of an optimizer step, computed exactly over micro-batches.

The step's log-probs are made first, without a gradient; the loss of all of them gives the gradient
with respect to each; then every micro-batch is run again with that as its weight (the chain rule).
So a step costs one forward pass more, and its result does not depend on how it was divided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from online_dpo.training.batching import MicroBatch
from online_dpo.training.objective import Objective, StepObjective
from online_dpo.training.packing import Pack, Part
from online_dpo.training.vocabulary import PartLoss, Terms

if TYPE_CHECKING:
    from accelerate import Accelerator


def couple(
    model: nn.Module,
    pack: Pack,
    objective: Objective,
    items: Sequence[int],
    batches: Sequence[MicroBatch],
    accelerator: Accelerator,
) -> tuple[PartLoss, dict[str, Tensor]]:
    """A loss of parts with the step's gradient, and the step's figures (on the main process).

    `objective` is a StepObjective; `batches` are this process's, of the step's `items`.
    """
    step = cast(StepObjective, objective)
    place = {item: index for index, item in enumerate(items)}
    logps = _step_logps(model, pack, step, place, batches, accelerator).requires_grad_()
    terms = step.step_terms(logps, items)
    (grads,) = torch.autograd.grad(terms.loss, logps)

    def part_loss(values: Tensor, part: Part, squares: Tensor | None = None) -> Terms:
        sums = part.sums(values)
        num_sequences = len(sums) // len(part.items)
        weights = grads[:num_sequences, [place[item] for item in part.items]]
        return Terms((sums * weights.flatten()).sum(), {})

    return part_loss, _counted_once({"loss": terms.loss.detach(), **terms.metrics}, accelerator)


@torch.no_grad()
def _step_logps(
    model: nn.Module,
    pack: Pack,
    step: StepObjective,
    place: Mapping[int, int],
    batches: Sequence[MicroBatch],
    accelerator: Accelerator,
) -> Tensor:
    """(K, n) float64 on every process: log-probs of each item's sequences."""
    count = len(step.step_sequences(next(iter(place))))
    device = accelerator.device
    logps = torch.zeros((count, len(place)), dtype=torch.float64, device=device)
    for micro in batches:
        batch = pack(micro.items, [step.step_sequences(item) for item in micro.items])
        values = model(batch)
        for part in batch.parts if micro.real else ():
            columns = [place[item] for item in part.items]
            sums = part.sums(values[part.start : part.stop])
            logps[:, columns] = sums.unflatten(0, (count, -1))
    reduced: Tensor = accelerator.reduce(logps, reduction="sum")
    return reduced.clone()


def _counted_once(figures: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """The same on the main process and zeros elsewhere, because figures are summed later."""
    share = 1.0 if accelerator.is_main_process else 0.0
    return {name: value.double() * share for name, value in figures.items()}
