"""Computing with bfloat16 copies of float32 weights, whose gradients reach the float32 ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class RoundedWeights:
    """bfloat16 copies of float32 parameters, made anew where these have changed.

    Changes are seen by torch's version counters, which torch's fused optimizers pass by: after
    their steps call `forget`.

    Autocast rounds every weight in every forward pass, keeps embeddings and what layers add up in
    float32, and casts at each border. Here all of a forward and backward pass is in bfloat16, but
    for what the model itself widens; gradients are summed in float32, as FSDP2 does it.
    """

    def __init__(self) -> None:
        self._copies: dict[Tensor, tuple[tuple[int, int], Tensor]] = {}

    def call(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The module's output, computed with the copies."""
        rounded: Any = _Rounded.apply
        parameters = {
            name: rounded(p, self.copy(p)) if p.dtype == torch.float32 else p
            for name, p in module.named_parameters()
        }
        return functional_call(module, parameters, (), dict(inputs))

    def copy(self, parameter: Tensor) -> Tensor:
        """The parameter in bfloat16, without a gradient."""
        state = (parameter.data_ptr(), parameter._version)
        known = self._copies.get(parameter)
        if known is None or known[0] != state:
            known = self._copies[parameter] = state, parameter.detach().to(torch.bfloat16)
        return known[1]

    def forget(self) -> None:
        """Free the copies."""
        self._copies.clear()


class _Rounded(torch.autograd.Function):
    """A parameter as its copy; the gradient arrives in float32."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.float(), None
