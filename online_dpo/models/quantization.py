"""4-bit weights for QLoRA (Dettmers et al. 2023, 2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def nf4(dtype: str) -> BitsAndBytesConfig:
    """NF4 in blocks of 64, computing in `dtype`.

    The blocks' scales are not quantized in turn: 0.4 bits a weight more, and the weights are then
    exactly those that a file of `dtype` can hold, so that quantizing this file gives them again.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Keep the weights as they are quantized.

    On some CPUs bitsandbytes packs them anew for inference at the first forward pass, rounded to
    bfloat16 scales, and in a form that has no backward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
