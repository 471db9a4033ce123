"""Attention of one new token a row in bfloat16, at which a CPU's flash kernel is slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "online_dpo_decode"
"""How transformers' registries know this attention."""

PLAIN = frozenset(
    {
        "position_ids",
        "use_cache",
        "past_key_values",
        "cache_position",
        "is_causal",
        "sliding_window",
    }
)
"""Arguments that change nothing for one token: the mask says what it does not see."""


CACHED_BYTES = 2**22
"""Keys in float32 at once: few enough to stay in a CPU's cache until they are used."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(B, n, H, D) from query (B, H, n, D), key and value (B, Hkv, L, D), as transformers calls it.

    More than one token a row, wider types, dropout and what a model asks for beside a mask go to
    torch's own.
    """
    asked = any(v is not None and k not in PLAIN for k, v in others.items())
    if query.shape[2] > 1 or query.element_size() > 2 or dropout or asked:
        given: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **others,
        )
        return given
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # (B, Hkv, H / Hkv, D)
    rows = max(1, CACHED_BYTES // (4 * key[0].numel()))
    masks = [None] * len(query) if attention_mask is None else attention_mask.split(rows)
    parts = zip(grouped.split(rows), key.split(rows), value.split(rows), masks, strict=False)
    out = torch.cat([_attend(*part, scale) for part in parts])
    return out.flatten(1, 2).unsqueeze(1), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, Hkv, G, D) from query (B, Hkv, G, D), key and value (B, Hkv, L, D), in float32 within.

    `mask` (B, 1, 1, L) is True where a row may look, or is added.
    """
    scores = torch.matmul(key.float(), query.float().transpose(2, 3)).transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1), value.float()).to(value.dtype)


def use_decode_attention(model: PreTrainedModel) -> None:
    """Let a model that runs torch's attention on a CPU decode by this one."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
