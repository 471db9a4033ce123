"""Which items of a step are to blame where its loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from online_dpo.errors import DivergedError
from online_dpo.training.objective import Objective
from online_dpo.training.packing import Pack
from online_dpo.training.sharding import gradient_norm

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN = 20
"""Most ids that a message lists."""


def diverged(
    number: int,
    means: Mapping[str, float],
    model: nn.Module,
    pack: Pack,
    objective: Objective,
    items: Sequence[int],
    accelerator: Accelerator,
) -> DivergedError:
    """The error of a step that was not taken; every process of a sharded model makes it."""
    values = ", ".join(f"{name} {value:.6g}" for name, value in means.items())
    found = [objective.item_id(i) for i in _to_blame(model, pack, objective, items, accelerator)]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return DivergedError(
        f"Training diverged at step {number}: the loss or the gradient is not finite ({values}). "
        f"Not finite by themselves: {', '.join(found[:SHOWN]) or 'none'}{more}. "
        "No weight was changed by this step. A lower learning rate or a higher beta usually helps."
    )


def _to_blame(
    model: nn.Module,
    pack: Pack,
    objective: Objective,
    items: Sequence[int],
    accelerator: Accelerator,
) -> Iterator[int]:
    """The items whose own loss or gradient is not finite; all where only their sum is not.

    A loss that couples a step's items has none for one of them: all of them are to blame.
    """
    alone = [] if objective.coupled else [i for i in items if not _is_finite(
        model, pack, objective, i, accelerator
    )]  # fmt: skip
    yield from alone or items


def _is_finite(
    model: nn.Module, pack: Pack, objective: Objective, item: int, accelerator: Accelerator
) -> bool:
    batch = pack((item,), [objective.sequences(item)])
    loss, _ = model(batch, objective.terms, squares=objective.needs_squares)
    accelerator.backward(loss)
    norm = gradient_norm(model)
    for parameter in model.parameters():
        parameter.grad = None
    return math.isfinite(torch.stack([loss.detach().double(), norm.detach().double()]).sum())
