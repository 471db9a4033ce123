"""From hidden states to log-probs of given tokens, with few logits in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from online_dpo.training.packing import Part

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**30}
"""Memory for logits in float32 at once: 262 tokens of a vocabulary of 32k on a CPU."""

KEPT_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Memory for the probabilities of a part, kept in the type that is computed in until its loss is
known; a larger part makes its logits twice."""

ROWS = 1024
"""Rows of a matrix that stay in a CPU's cache between two passes."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a part of a batch adds to a step: sums over its items, not means.

    `loss` is a scalar with a gradient, `metrics` are scalars without.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


PartLoss = Callable[[Tensor, Part, Tensor | None], Terms]
"""The terms of a part from (n,) float32 values of its response tokens: their log-probs and, where
they are asked for, log sum_v p(v)^2 over the vocabulary, which take no gradient."""


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits may be in memory at once."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


def token_logps(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, rounded: Tensor | None = None
) -> Tensor:
    """(N,) float32 log-probs of `targets` (N,) from hidden states (N, H); no gradient.

    `rounded` is the head's weight in the type that is computed in, where it is at hand.
    """
    weight, bias = _weights(head)
    weight = weight.to(_compute_dtype(hidden)) if rounded is None else rounded
    size = chunk_tokens(weight.shape[0], hidden.device)
    parts = [
        _softmax(linear(hidden[i : i + size], weight, bias), targets[i : i + size])[0]
        for i in range(0, len(targets), size)
    ]
    return torch.cat(parts)


def fused_terms(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    parts: Sequence[Part],
    part_loss: PartLoss,
    *,
    squares: bool = False,
    rounded: Tensor | None = None,
) -> Terms:
    """The summed terms of all parts, from hidden states (N, H), (N,) targets and the output head.

    The gradient is computed beside the loss, part by part: dL/dlogp of each token comes from
    `part_loss` by autograd, and dL/dlogits = dL/dlogp * (onehot - softmax) in closed form. So the
    logits of a part are made once, and what is kept of them is gone before the next part. Those of
    a part too large for that are made twice, chunk by chunk. `rounded` is the head's weight in the
    type that is computed in.
    """
    names: list[str] = []
    apply: Any = _Fused.apply
    weight, bias = _weights(head)
    given = (targets, parts, part_loss, squares, rounded, names)
    loss, *values = apply(hidden, weight, bias, *given)
    return Terms(loss, dict(zip(names, values, strict=True)))


class _Fused(torch.autograd.Function):
    """Loss and metrics forward; what was computed beside them, times the loss's gradient, back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        parts: Sequence[Part],
        part_loss: PartLoss,
        squares: bool,
        rounded: Tensor | None,
        names: list[str],
    ) -> tuple[Tensor, ...]:
        dtype = _compute_dtype(hidden)
        low = weight.to(dtype) if rounded is None else rounded
        work = _Work(hidden.to(dtype), low, bias, targets, weight, ctx)
        totals: dict[str, Tensor] = {}
        for part in parts:
            terms = work.do(part, part_loss, squares)
            for name, value in {"": terms.loss.detach(), **terms.metrics}.items():
                totals[name] = totals[name] + value if name in totals else value
        wide = None if work.grad_hidden is None else work.grad_hidden.to(hidden.dtype)
        ctx.grads = wide, work.grad_weight, work.grad_bias
        loss = totals.pop("")
        names.extend(totals)
        ctx.mark_non_differentiable(*totals.values())
        return (loss, *totals.values())

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grads = [None if g is None else g.mul_(grad) for g in ctx.grads]
        del ctx.grads
        return (*grads, *[None] * 6)


class _Work:
    """The gradients of one call as they grow, in the types of what they belong to."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        master: Tensor,
        ctx: Any,
    ) -> None:
        self.hidden, self.weight, self.targets = hidden, weight, targets
        self.bias = bias
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        self.grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        wide = torch.promote_types(master.dtype, torch.float32)  # sharded weights are bfloat16
        self.grad_weight = torch.zeros_like(master, dtype=wide) if wants_weight else None
        self.grad_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        self.size = chunk_tokens(weight.shape[0], hidden.device)
        kept_bytes = KEPT_BYTES.get(hidden.device.type, KEPT_BYTES["cuda"])
        self.most_kept = kept_bytes // (weight.shape[0] * hidden.element_size())

    def do(self, part: Part, part_loss: PartLoss, squares: bool) -> Terms:
        chunks = [
            slice(i, min(i + self.size, part.stop)) for i in range(part.start, part.stop, self.size)
        ]
        keeps = len(chunks) == 1 or part.stop - part.start <= self.most_kept
        kept: list[Tensor] = []
        logps, norms = [], []
        for chunk in chunks:
            values, probs = self.softmax(chunk)
            logps.append(values)
            if squares:
                norms.append(torch.linalg.vector_norm(probs, dim=1))
            if keeps:
                kept.append(probs.to(self.hidden.dtype))
        with torch.enable_grad():
            leaf = torch.cat(logps).requires_grad_()
            terms = part_loss(leaf, part, 2.0 * torch.cat(norms).log() if squares else None)
            (grads,) = torch.autograd.grad(terms.loss, leaf)
        for number, chunk in enumerate(chunks):
            share = grads[chunk.start - part.start : chunk.stop - part.start]
            self.add(chunk, kept[number] if keeps else self.softmax(chunk)[1], share)
        return terms

    def softmax(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """(n,) log-probs of the targets and (n, V) probabilities, in float32."""
        logits = linear(self.hidden[chunk], self.weight, self.bias)
        return _softmax(logits, self.targets[chunk])

    def add(self, chunk: slice, probs: Tensor, grads: Tensor) -> None:
        """Add dL/dlogits = grads * (onehot - softmax), carried on to weight and hidden states."""
        probs = probs.to(self.hidden.dtype)
        targets, hidden = self.targets[chunk], self.hidden[chunk]
        grads = grads[:, None].to(hidden.dtype)
        if self.grad_hidden is not None:
            drawn = torch.mm(probs, self.weight)
            self.grad_hidden[chunk] = grads * (self.weight[targets] - drawn)
        if self.grad_weight is not None:
            scaled = hidden * grads
            if self.grad_weight.dtype == probs.dtype:
                self.grad_weight.addmm_(probs.t(), scaled, alpha=-1)
            else:
                _subtract(self.grad_weight, torch.mm(probs.t(), scaled))
            self.grad_weight.index_add_(0, targets, scaled.to(self.grad_weight.dtype))
        if self.grad_bias is not None:
            wide = grads.to(self.grad_bias.dtype)
            self.grad_bias -= (probs * grads).sum(0).to(self.grad_bias.dtype)
            self.grad_bias.index_add_(0, targets, wide.squeeze(1))


def _subtract(wide: Tensor, narrow: Tensor) -> None:
    """wide -= narrow, of different types; a CPU widens a copy of all that it is given first."""
    rows = ROWS if wide.device.type == "cpu" else len(wide)
    for begin in range(0, len(wide), rows):
        wide[begin : begin + rows] -= narrow[begin : begin + rows]


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) log-probs of `targets` and (n, V) probabilities; logits (n, V) are overwritten.

    torch's softmax is several times faster on a CPU than log_softmax with exp behind it. The
    log-sum-exp then is the largest logit less the log of its probability, which is at least 1 / V.
    """
    wanted = logits.gather(1, targets[:, None]).squeeze(1)
    largest = logits.amax(dim=1)
    if logits.element_size() < 4:
        probs = torch.softmax(logits, 1, dtype=torch.float32)
    else:
        probs = torch.softmax(logits, 1, out=logits)
    return wanted.to(probs.dtype) - largest + probs.amax(dim=1).log(), probs


def _weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Any = head.weight
    bias: Any = getattr(head, "bias", None)
    return weight, bias


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What autocast would compute in."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
