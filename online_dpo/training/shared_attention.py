"""Attention over a packed row in which all responses of a prompt share it, with no work masked out.

A response token attends to its prompt and to its own response so far. The two are computed apart,
by the flash kernel, and merged by their log-sum-exps, as flash decoding merges splits of the keys:
with l = log(e^a + e^b), out = e^(a-l) out_a + e^(b-l) out_b. The kernel's backward pass takes the
merged output and log-sum-exp in place of a part's own and then gives that part's share of the
gradients exactly. So the cost is P^2/2 + sum of (R^2/2 + P R) for a prompt of P and responses of R
tokens, against K (P + R)^2 / 2 for K separate rows.

Elsewhere than on a CPU the same layout runs through torch's scaled_dot_product_attention with a
mask; the kernels used there give no log-sum-exp with a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from online_dpo.training.packing import Sharing

NAME = "online_dpo_shared"
"""How transformers' registries know this attention."""

PLAIN = frozenset({"position_ids", "use_cache", "past_key_values", "cache_position", "is_causal"})
"""Arguments that do not change what a token attends to here."""


class UnsupportedAttention(Exception):
    """The model's attention is more than causal softmax attention: windows, sinks, biases."""


def register() -> None:
    """Make the attention known to transformers, without a mask of its own. Safe to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, _no_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sharing: Sharing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, T, H, D) from query (1, H, T, D), key and value (1, Hkv, T, D), as transformers calls it.

    Raises UnsupportedAttention where the model asks for more than causal attention.
    """
    asked = sorted(k for k, v in others.items() if v is not None and k not in PLAIN)
    if sharing is None or asked or dropout or attention_mask is not None:
        raise UnsupportedAttention(", ".join(asked) or "attention without a shared layout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    # Rotary embeddings leave float32 behind under autocast, where torch's attention would cast.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    heads = query.shape[1]
    query, key, value = (_rows(x, heads, dtype) for x in (query, key, value))
    return _attend(query, key, value, sharing, scale).unsqueeze(0), None


def _rows(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(T, H, D) from (1, H, T, D) or (1, Hkv, T, D): a key or value head for each query head."""
    rows = x.squeeze(0).transpose(0, 1).to(dtype)
    times = heads // rows.shape[1]
    return rows if times == 1 else rows.repeat_interleave(times, dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, sharing: Sharing, scale: float) -> Tensor:
    """(T, H, D) from (T, H, D) each."""
    attend: Any = _Flash.apply if query.device.type == "cpu" else _masked
    out: Tensor = attend(query, key, value, sharing, scale)
    return out


class _Flash(torch.autograd.Function):
    """Prompts among themselves; responses to themselves and to their prompts, merged.

    Tokens are brought into the kernel's layout and back inside, where both directions are plain
    gathers; autograd would scatter.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sharing: Sharing, scale: float
    ) -> Tensor:
        most = sharing.responses.shape[1]
        mask = _prompt_mask(sharing, query.dtype)
        (q_p, k_p, v_p), (q_r, k_r, v_r) = (
            [_take(x, index) for x in (query, key, value)]
            for index in (sharing.prompts, sharing.responses.flatten(1))
        )  # (G, H, P, D) and (G, H, K R, D) each
        out_p, lse_p = _flash(q_p, k_p, v_p, causal=True, mask=None, scale=scale)
        own = [_unstack(x, most) for x in (q_r, k_r, v_r)]
        out_o, lse_o = _flash(*own, causal=True, mask=None, scale=scale)
        out_o, lse_o = _stack(out_o, most), _stack(lse_o, most)
        out_c, lse_c = _flash(q_r, k_p, v_p, causal=False, mask=mask, scale=scale)
        lse = torch.logaddexp(lse_o, lse_c)  # (G, H, K R)
        weight = (lse_o - lse).exp_()[..., None].to(out_o.dtype)
        out_r = torch.lerp(out_c, out_o, weight)
        ctx.save_for_backward(q_p, k_p, v_p, q_r, k_r, v_r, out_p, lse_p, out_r, lse, mask)
        ctx.sharing, ctx.scale = sharing, scale
        return _put_back(out_p, out_r, sharing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q_p, k_p, v_p, q_r, k_r, v_r, out_p, lse_p, out_r, lse, mask = ctx.saved_tensors
        sharing, scale = ctx.sharing, ctx.scale
        most = sharing.responses.shape[1]
        grad_p = _take(grad, sharing.prompts)
        grad_r = _take(grad, sharing.responses.flatten(1))
        if sharing.prompt_padding is not None:
            grad_p.masked_fill_(sharing.prompt_padding[:, None, :, None], 0.0)
        if sharing.response_padding is not None:
            grad_r.masked_fill_(sharing.response_padding.flatten(1)[:, None, :, None], 0.0)
        dq_p, dk_p, dv_p = _flash_backward(
            grad_p, q_p, k_p, v_p, out_p, lse_p, causal=True, mask=None, scale=scale
        )
        own = [_unstack(x, most) for x in (grad_r, q_r, k_r, v_r, out_r, lse)]
        dq_o, dk_r, dv_r = _flash_backward(*own, causal=True, mask=None, scale=scale)
        dq_c, dk_c, dv_c = _flash_backward(
            grad_r, q_r, k_p, v_p, out_r, lse, causal=False, mask=mask, scale=scale
        )
        return (
            _put_back(dq_p, _stack(dq_o, most).add_(dq_c), sharing),
            _put_back(dk_p.add_(dk_c), _stack(dk_r, most), sharing),
            _put_back(dv_p.add_(dv_c), _stack(dv_r, most), sharing),
            *(None, None),
        )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(G, H, L, D) from (T, H, D) by (G, L) indices."""
    taken: Tensor = x.index_select(0, index.reshape(-1)).unflatten(0, index.shape)
    return taken.transpose(1, 2)


def _prompt_mask(sharing: Sharing, dtype: torch.dtype) -> Tensor | None:
    """(G, 1, 1, P) to add to the scores of responses: -inf at a prompt's padding."""
    if sharing.prompt_padding is None:
        return None
    padding = sharing.prompt_padding[:, None, None]
    return torch.zeros_like(padding, dtype=dtype).masked_fill_(padding, -torch.inf)


def _put_back(prompts: Tensor, responses: Tensor, sharing: Sharing) -> Tensor:
    """(T, H, D) from (G, H, P, D) and (G, H, K R, D), without padding."""
    both = [x.transpose(1, 2).reshape(-1, *x.shape[1::2]) for x in (prompts, responses)]
    return torch.cat(both).index_select(0, sharing.inverse)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, H, L, D) outputs and (B, H, L) log-sum-exps."""
    result: tuple[Tensor, Tensor]
    result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, never in bfloat16: there the kernel is far slower."""
    wide = [
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (grad, query, key, value, out)
    ]
    mask = None if mask is None else mask.to(wide[0].dtype)
    grads: tuple[Tensor, Tensor, Tensor]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *wide, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return grads


def _unstack(x: Tensor, most: int) -> Tensor:
    """(G, H, K R, ...) to (G K, H, R, ...)."""
    split: Tensor = x.unflatten(2, (most, -1)).transpose(1, 2)
    return split.reshape(-1, *split.shape[2:])


def _stack(x: Tensor, most: int) -> Tensor:
    """(G K, H, R, ...) to (G, H, K R, ...)."""
    stacked: Tensor = x.unflatten(0, (-1, most)).transpose(1, 2).flatten(2, 3)
    return stacked


def _masked(query: Tensor, key: Tensor, value: Tensor, sharing: Sharing, scale: float) -> Tensor:
    """The same by two calls of scaled_dot_product_attention."""
    groups, most, longest = sharing.responses.shape
    (q_p, k_p, v_p), (q_r, k_r, v_r) = (
        [_take(x, index) for x in (query, key, value)]
        for index in (sharing.prompts, sharing.responses.flatten(1))
    )
    out_p = scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, scale=scale)
    place = torch.arange(most * longest, device=query.device)
    same = place[:, None] // longest == place[None] // longest
    own = torch.where(same & (place[:, None] >= place[None]), 0.0, -torch.inf).to(query.dtype)
    own = own.expand(groups, 1, -1, -1)
    mask = _prompt_mask(sharing, query.dtype)
    past = query.new_zeros(()) if mask is None else mask
    past = past.expand(groups, 1, most * longest, k_p.shape[2])
    out_r = scaled_dot_product_attention(
        q_r,
        torch.cat([k_p, k_r], dim=2),
        torch.cat([v_p, v_r], dim=2),
        attn_mask=torch.cat([past, own], dim=-1),
        scale=scale,
    )
    return _put_back(out_p, out_r, sharing)


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    """What transformers asks for before the layers run; refuses windows and chunks."""
    if local_size is not None:
        raise UnsupportedAttention("a local window")
