"""AdamW with moments in float32 (torch) or in 8 bits (bitsandbytes), and its state as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_REBUILT = frozenset({"qmap1", "qmap2"})
"""Constant tables of bitsandbytes that its state refers to."""


def make_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    moments: str = "float32",
) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; weight decay on matrices only, not on norms and biases.

    `moments` is TrainConfig.adam_moments. In 8 bits those of embeddings, whose gradients are sparse
    and uneven, stay in float32, as bitsandbytes advises; those of small tensors do of themselves.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if moments == "float32":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    optimizer: torch.optim.Optimizer = _eight_bit(moments)(groups, lr=learning_rate, betas=betas)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            optimizer.state[module.weight] = _float32_state(module.weight)
    return optimizer


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's state, all of it as tensors; empty before its first step."""
    return {
        name: torch.as_tensor(value)
        for name, value in optimizer.state.get(parameter, {}).items()
        if name not in _REBUILT
    }


def empty_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Give a parameter its state, and return the tensors that are to be filled with a stored one.

    They are the optimizer's own: a paged one must stay the one that it is. `put_step_count` takes
    what is no tensor there.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    elif not optimizer.state[parameter]:
        group, index = _position(optimizer, parameter)
        eight_bit: Any = optimizer
        eight_bit.init_state(optimizer.param_groups[group], parameter, group, index)
    return state_tensors(optimizer, parameter)


def put_step_count(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor]
) -> None:
    """Take the count of steps from a filled state where the optimizer keeps it as a number."""
    if isinstance(optimizer.state[parameter]["step"], int):
        optimizer.state[parameter]["step"] = int(state["step"])


def _eight_bit(moments: str) -> Any:
    import bitsandbytes

    optim = bitsandbytes.optim
    return {"8bit": optim.AdamW8bit, "paged_8bit": optim.PagedAdamW8bit}[moments]


def _float32_state(parameter: Tensor) -> dict[str, Any]:
    """What bitsandbytes begins with for a parameter whose moments it keeps in float32."""
    zeros = {
        name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")
    }
    return {"step": 0, **zeros}


def _position(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[int, int]:
    """Where a parameter stands: its group, and its place there."""
    return next(
        (group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, other in enumerate(group["params"])
        if other is parameter
    )
