"""Activations in the CPU's memory: what gradient checkpointing keeps of each layer waits there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel


def offload_checkpoints(model: PreTrainedModel) -> None:
    """Send the inputs of a model's checkpointed layers to the CPU until the backward pass.

    A checkpointed layer saves nothing else; the hooks lie around the checkpoint, so that neither
    weights nor what the recomputation saves go along.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            inner = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = _offloaded(inner)  # type: ignore[assignment]


def _offloaded(checkpoint: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(*args, **kwargs)

    return run
